// The words of the shared-memory transport: what can be asked of it, how it is set up, and how it fails.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace shoal {

// `f8` and `raw` can be moved and are not added up. `boolean`: sum and max are OR, product and min are AND.
enum class DType : std::uint8_t {
  f32, f64, f16, bf16, i8, u8, i16, i32, i64, u16, u32, u64, boolean, c64, c128, f8, raw
};
enum class ReduceOp : std::uint8_t { sum, avg, product, min, max, band, bor, bxor };
enum class Op : std::uint8_t {
  barrier, all_reduce, reduce, broadcast, all_gather, reduce_scatter, gather, scatter, all_to_all
};
constexpr int kOps = 9;
constexpr int kDTypes = 17;
constexpr int kReduceOps = 8;

std::size_t size_of(DType);  // bytes; f8 and raw: 1
const char* name_of(DType);
const char* name_of(ReduceOp);
const char* name_of(Op);
// Whether elements of this type can be combined so: no AVG of whole numbers, no bits of floating ones, no order of
// complex ones.
bool can_reduce(DType, ReduceOp);

// What every collective raises. what() is one complete line: operation, group, bytes, own rank, and the ranks missing
// with their last position, or both signatures that disagree, or who died.
// After `timeout`, `dead_peer` and `aborted` the group is dead for all members; after `mismatch` and `refused` (the
// same on all ranks, nothing was written) it goes on working.
struct Failure : std::runtime_error {
  enum Kind { timeout, dead_peer, mismatch, aborted, refused } kind;
  Failure(Kind kind_, const std::string& line) : std::runtime_error(line), kind(kind_) {}
};

struct Options {
  std::string name = "group";          // in messages
  double timeout_s = 60.0;             // of a collective that names none
  int usable_cores = 1;                // of all ranks of this group together (affinity and quota); decides on spinning
  std::size_t slot_bytes = 0;          // staging room of a rank; 0: the usual. The same everywhere
  std::size_t arena_bytes = 1ull << 36;  // symmetric heap of a rank: address space, sparse. The same everywhere
  void* mapping = nullptr;             // all of it (total_bytes), mapped by the caller; memfd may be -1 then
  std::vector<int> names;              // what the ranks are called in messages, where not by their number
  std::vector<char*> arenas;           // beside `mapping`: each rank's arena, mapped by the caller too, with other use
  // Called by a rank that is about to sleep, with the rank it waits for, and every 0.1 s again; with -1 when it goes on.
  // false: that rank has gone, which is as good as if it had left the group.
  std::function<bool(int)> asleep;
};

struct OpCounters {
  std::uint64_t calls = 0;
  std::uint64_t bytes = 0;            // of the operation's full buffer, summed over calls
  std::uint64_t zero_copy_calls = 0;  // that read and wrote the ranks' tensors in place
  double moving_s = 0;                // inside of calls, not waiting
  std::vector<double> waiting_s;      // by the rank waited for
};

struct Position {  // how far a rank has come
  std::uint64_t sequence = 0;  // of its latest collective; the first is 1; 0: none yet
  Op op = Op::barrier;
  std::uint64_t step = 0;      // within it
  int pid = 0;
  bool left = false;           // it has closed the group
};

}  // namespace shoal
