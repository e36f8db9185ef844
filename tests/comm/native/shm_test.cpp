// Tests of the shared-memory transport. Ends with 0, or with 1 after a line that says what is not so.
#include "test_channels.hpp"
#include "test_collectives.hpp"
#include "test_failures.hpp"
#include "test_numbers.hpp"

namespace {

constexpr DType kAll[] = {DType::f32, DType::f64, DType::f16, DType::bf16, DType::i8,
                          DType::u8,  DType::i16, DType::u16, DType::i32,  DType::u32,
                          DType::i64, DType::u64, DType::c64, DType::c128, DType::boolean};

constexpr DType kFew[] = {DType::f32, DType::bf16, DType::u8, DType::c128};

// The slots hold 32 KiB: 4 KiB before all have entered, three pieces of 8 KiB after.
template <std::size_t kCount>
void every_collective(int world, Where where, const DType (&dtypes)[kCount]) {
  on_ranks(world, small_options(), [&](ShmGroup& group, int) {
    for (DType dtype : dtypes) {
      for (int op = 0; op < kReduceOps; ++op) {
        const auto reduce = static_cast<ReduceOp>(op);
        if (can_reduce(dtype, reduce)) check_reductions(group, dtype, reduce, 129, where);
      }
      check_reductions(group, dtype, ReduceOp::sum, 4099, where);
      check_moves(group, dtype, 131, where);
      check_moves(group, dtype, 4099, where);
    }
    for (std::size_t count : {0ul, 1ul, 20011ul}) {
      check_reductions(group, DType::f32, ReduceOp::sum, count, where);
      check_moves(group, DType::f8, count, where);
    }
    const OpCounters counted = group.counters(Op::all_reduce);
    CLAIM(counted.calls > 0 && counted.bytes > 0, "nothing was counted");
    CLAIM((counted.zero_copy_calls > 0) == (where == Where::everywhere && group.world() > 1), "%d in place",
          static_cast<int>(counted.zero_copy_calls));
  });
}

template <std::size_t kCount>
void every_collective(const std::vector<int>& worlds, const DType (&dtypes)[kCount]) {
  for (int world : worlds) {
    for (Where where : {Where::nowhere, Where::everywhere, Where::all_but_last}) every_collective(world, where, dtypes);
  }
}

}  // namespace

// Parts: numbers, failures, channels, all (every collective for 1 to 9 ranks, every dtype), few (the same, less of it: sanitizers
// make it slow).
int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string part = argv[i];
    if (part == "failures") test_failures();
    if (part == "numbers") test_numbers();
    if (part == "channels") test_channels();
    if (part == "all") every_collective({1, 2, 3, 4, 5, 6, 7, 8, 9}, kAll);
    if (part == "few") every_collective({1, 2, 5}, kFew);
  }
  std::puts("all is so");
  return 0;
}
