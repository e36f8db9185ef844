// Collectives among the processes of one host, over one shared memory file.
//
// No torch in here. build.py compiles this folder's shm_*.cpp into the torch extension, whose files include this.
//
// The file is an anonymous memory file (memfd, so nothing has a name and nothing can be left behind). Its maker calls
//   ftruncate(fd, ShmGroup::total_bytes(world, options))
//   fallocate(fd, 0, 0, ShmGroup::reserved_bytes(world, options))
// and passes it on to the others; each then constructs its ShmGroup, which waits until all have (options.timeout_s).
// It must be new: all zeros. The constructor duplicates the descriptors it keeps: the caller may close its own.
//
// Collectives of one object are called by one thread at a time, in the same order on all ranks; all other functions by
// any thread at any time. Every collective compares operation, dtype, reduce op, sizes and root of all ranks before it
// writes a byte of the caller's memory. timeout_s <= 0 means the group's. Raises Failure.
//
// The sum is taken in the order of ranks: ((rank 0 + rank 1) + rank 2) + ..., each element at one place, so all ranks
// get the same bits. 16-bit floats are accumulated in f32 and rounded once; AVG divides the sum once.
//
// `in` may be `out` (for all_gather: out's own part; for reduce_scatter: in's own part); no other overlap.
// Tensors that lie on the arenas (allocate) of all ranks are read and written in place, nothing else is asked for.
//
// Fork: the child must not use the object (its collectives raise, its destructor does nothing that others see). Memory
// of the arena stays shared with the child: what it writes there, all ranks see. No process that a rank starts by exec
// gets any of it. Destroy the object after its last collective has returned.
#pragma once

#include <memory>

#include "shm_types.hpp"

namespace shoal {

class ShmGroup {
 public:
  static std::size_t reserved_bytes(int world, const Options&);  // must be backed by memory up front
  static std::size_t total_bytes(int world, const Options&);     // with the arenas, which are sparse
  static constexpr int kMostRanks = 256;

  // pidfds: one a rank; -1 where there is none (own rank, threads). Raises Failure or std::invalid_argument.
  ShmGroup(int memfd, int rank, int world, const std::vector<int>& pidfds, const Options&);
  ~ShmGroup();
  ShmGroup(const ShmGroup&) = delete;
  ShmGroup& operator=(const ShmGroup&) = delete;

  int rank() const;
  int world() const;
  const std::string& name() const;

  // What the next collectives must agree on beside what they are told: a digest of the caller's own words.
  void say(std::uint64_t words);

  // Counts are in elements.
  void barrier(double timeout_s = 0);
  void all_reduce(const void* in, void* out, std::size_t count, DType, ReduceOp, double timeout_s = 0);
  void reduce(const void* in, void* out, std::size_t count, DType, ReduceOp, int root, double timeout_s = 0);
  void broadcast(void* data, std::size_t count, DType, int root, double timeout_s = 0);
  // out: world * count, by rank
  void all_gather(const void* in, void* out, std::size_t count, DType, double timeout_s = 0);
  // outs[r] takes counts[r] elements from rank r; all ranks know all counts
  void all_gather(const void* in, void* const* outs, const std::size_t* counts, DType, double timeout_s = 0);
  // in: world * count, by rank
  void reduce_scatter(const void* in, void* out, std::size_t count, DType, ReduceOp, double timeout_s = 0);
  // ins[r]: counts[r] elements for rank r; all ranks know all counts
  void reduce_scatter(const void* const* ins, void* out, const std::size_t* counts, DType, ReduceOp,
                      double timeout_s = 0);
  // outs: at the root, one a rank; elsewhere null
  void gather(const void* in, void* const* outs, std::size_t count, DType, int root, double timeout_s = 0);
  // ins: at the root, one a rank; elsewhere null
  void scatter(const void* const* ins, void* out, std::size_t count, DType, int root, double timeout_s = 0);
  // ins[r]: send_counts[r] elements for rank r; outs[r]: receive_counts[r] elements from rank r
  void all_to_all(const void* const* ins, const std::size_t* send_counts, void* const* outs,
                  const std::size_t* receive_counts, DType, double timeout_s = 0);

  // The symmetric heap. allocate: memory of this rank's arena that is really there, 128-byte aligned, zero or left over
  // from earlier use; null where there is no room. It stays mapped as long as this object lives.
  void* allocate(std::size_t bytes);
  void release(void*);
  bool owns(const void*) const;
  std::size_t arena_room() const;  // bytes of address space in the arena of a rank (0: none could be mapped)

  // All members' collectives raise from now on, also those under way, wherever they wait.
  void abort(const std::string& why);
  std::string why_aborted() const;  // "" as long as the group lives

  void set_timeout(double timeout_s);
  OpCounters counters(Op) const;
  std::vector<Position> positions() const;  // by rank; may be a step behind

  struct Inside;  // shm_inside.hpp
  Inside& inside() { return *inside_; }

 private:
  std::unique_ptr<Inside> inside_;
};

}  // namespace shoal
