// What a group is made of, and the life of one collective. For the transport's own files only.
#pragma once

#include <array>

#include "shm_arena.hpp"
#include "shm_group.hpp"
#include "shm_wait.hpp"
#include "shm_watch.hpp"

namespace shoal {

struct ShmGroup::Inside {
  Inside(int memfd, int rank, int world, const std::vector<int>& pidfds, const Options&);
  ~Inside();
  void join();                            // until all ranks are here
  void abort(Failure::Kind, const std::string& why);
  std::string abort_text() const;         // "" while the group lives
  std::string called(int rank) const;     // "rank 2"; or another number, where the ranks have names
  std::string position_of(int rank) const;  // "rank 2 (pid 71, last in operation 16, broadcast, step 3)"
  bool forked() const;

  struct Count {  // written by the calling thread, read by any
    std::atomic<std::uint64_t> calls{0}, bytes{0}, zero_copy_calls{0};
    std::atomic<double> moving_s{0};
    std::vector<std::atomic<double>> waiting_s;
  };

  const Options options;
  const int rank, world;
  Segment segment;
  Waiter waiter;
  Arena arena;
  const std::uint64_t fork_generation;
  std::size_t arena_room = 0;
  bool joined = false;
  std::atomic<double> timeout_s;
  std::atomic<bool> busy{false};
  std::uint64_t words = 0;  // see Signature
  std::uint64_t sequence = ~std::uint64_t{0};  // of the latest operation; joining is number 0
  std::array<Count, kOps> counts;
  Watch watch;  // last: its thread uses the rest
};

// From entering a collective to leaving it. Steps count from 1, which `open` publishes.
class Call {
 public:
  Call(ShmGroup::Inside& inside, Signature signature, std::size_t bytes, double timeout_s);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // Publishes the signature and waits for all; raises on all ranks unless they agree and can be served.
  void open();
  // The same for all-to-all, where what each rank sends to each must be what that one expects.
  void compare_pairs();
  // Whether all ranks said so; the same answer on all. After `open`.
  bool all(std::uint8_t flags) const;
  void publish(std::uint64_t step) const { inside.waiter.publish(at_of(sequence, step, signature.op)); }
  void wait(std::uint64_t step, int whom = -1) {
    const auto outcome = inside.waiter.wait(at_of(sequence, step), whom, deadline_, waited_.data());
    if (outcome != Waiter::Outcome::reached) fail(outcome, at_of(sequence, step), whom);
  }
  const Signature& signature_of(int rank) const { return inside.segment.progress(rank, sequence).signature; }
  char* opening(int rank) const { return inside.segment.opening(rank, sequence); }
  std::uint64_t* table(int rank) const { return inside.segment.table(rank, sequence); }
  void zero_copy() const;  // count it as such

  ShmGroup::Inside& inside;
  const int rank, world;
  const std::uint64_t sequence;
  Signature signature;

 private:
  [[noreturn]] void fail(Waiter::Outcome, std::uint64_t target, int whom);
  [[noreturn]] void refuse(Failure::Kind, const std::string& why) const;
  std::string described() const;
  void compare() const;
  const std::size_t bytes_;
  double timeout_s_;
  Clock::time_point start_, deadline_;
  std::vector<std::atomic<double>>& waited_;
  double waited_before_ = 0;
};

inline Signature signature_for(Op op, DType dtype, std::size_t count, ReduceOp reduce = ReduceOp::sum, int root = -1) {
  return {op, dtype, reduce, 0, root, count, 0, 0, 0, 0};
}

std::uint64_t digest_of(const std::size_t* counts, int world);

}  // namespace shoal
