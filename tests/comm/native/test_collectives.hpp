// Every collective, exactly, for every dtype, number of ranks and awkward size, staged and in place.
#pragma once

#include <numeric>

#include "shm_ranks.hpp"
#include "shm_values.hpp"

using namespace shoal;

// Memory of a rank, on its arena or not, with bytes behind it that nobody may touch.
class Memory {
 public:
  Memory(ShmGroup& group, std::size_t bytes, bool on_arena) : group_(group), bytes_(bytes), on_arena_(on_arena) {
    data_ = static_cast<char*>(on_arena ? group.allocate(bytes + kGuard) : std::malloc(bytes + kGuard));
    CLAIM(data_ && group.owns(data_) == on_arena, "%zu bytes", bytes);
    std::memset(data_, 0x5a, bytes + kGuard);
  }
  Memory(const Memory&) = delete;
  ~Memory() {
    for (std::size_t i = 0; i < kGuard; ++i) CLAIM(data_[bytes_ + i] == 0x5a, "byte %zu behind %zu", i, bytes_);
    on_arena_ ? group_.release(data_) : std::free(data_);
  }
  char* data() { return data_; }

 private:
  static constexpr std::size_t kGuard = 64;
  ShmGroup& group_;
  std::size_t bytes_;
  bool on_arena_;
  char* data_;
};

inline void fill(DType dtype, char* to, std::size_t begin, std::size_t count, int rank, ReduceOp op) {
  for (std::size_t i = 0; i < count; ++i) put(dtype, to, i, number_of(rank, begin + i, op));
}

inline void claim_same(const void* a, const void* b, std::size_t bytes, const char* what, int rank) {
  for (std::size_t i = 0; i < bytes; ++i) {
    const bool same = static_cast<const char*>(a)[i] == static_cast<const char*>(b)[i];
    CLAIM(same, "%s on rank %d, byte %zu of %zu", what, rank, i, bytes);
  }
}

// Which ranks have their tensors on the arenas.
enum class Where { nowhere, everywhere, all_but_last };
inline bool on_arena(Where where, int rank, int world) {
  return where == Where::everywhere || (where == Where::all_but_last && rank + 1 < world);
}

inline void check_reductions(ShmGroup& group, DType dtype, ReduceOp op, std::size_t count, Where where) {
  const int rank = group.rank(), world = group.world(), root = static_cast<int>(count) % world;
  const bool arena = on_arena(where, rank, world);
  const std::size_t size = size_of(dtype), bytes = count * size;
  std::vector<char> expected(world * bytes + 1);
  for (std::size_t i = 0; i < world * count; ++i) put_expected(dtype, op, world, expected.data(), i);

  Memory in(group, world * bytes, arena), out(group, bytes, arena);
  fill(dtype, in.data(), 0, world * count, rank, op);
  const std::vector<char> before(in.data(), in.data() + world * bytes);
  group.all_reduce(in.data(), out.data(), count, dtype, op);
  claim_same(out.data(), expected.data(), bytes, "all_reduce", rank);
  claim_same(in.data(), before.data(), world * bytes, "input of all_reduce", rank);

  std::memset(out.data(), 0x5a, bytes);
  group.reduce(in.data(), out.data(), count, dtype, op, root);
  if (rank == root) claim_same(out.data(), expected.data(), bytes, "reduce", rank);
  for (std::size_t i = 0; i < bytes && rank != root; ++i) CLAIM(out.data()[i] == 0x5a, "reduce wrote on rank %d", rank);

  group.reduce_scatter(in.data(), out.data(), count, dtype, op);
  claim_same(out.data(), expected.data() + rank * bytes, bytes, "reduce_scatter", rank);
  claim_same(in.data(), before.data(), world * bytes, "input of reduce_scatter", rank);

  // Uneven: rank r takes (r + 1) parts of a triangle.
  const std::size_t unit = 2 * count / (world + 1);
  std::vector<std::size_t> counts(world);
  std::vector<const void*> ins(world);
  std::size_t begin = 0, mine = 0;
  for (int r = 0; r < world; ++r) {
    counts[r] = unit * (r + 1);
    ins[r] = in.data() + begin * size;
    if (r == rank) mine = begin;
    begin += counts[r];
  }
  Memory part(group, counts[rank] * size, false);
  group.reduce_scatter(ins.data(), part.data(), counts.data(), dtype, op);
  claim_same(part.data(), expected.data() + mine * size, counts[rank] * size, "uneven reduce_scatter", rank);

  group.reduce_scatter(in.data(), in.data() + rank * bytes, count, dtype, op);  // into its own part
  claim_same(in.data() + rank * bytes, expected.data() + rank * bytes, bytes, "reduce_scatter in place", rank);
  fill(dtype, in.data(), 0, world * count, rank, op);
  group.all_reduce(in.data(), in.data(), count, dtype, op);
  claim_same(in.data(), expected.data(), bytes, "all_reduce in place", rank);
}

inline void check_moves(ShmGroup& group, DType dtype, std::size_t count, Where where) {
  const int rank = group.rank(), world = group.world(), root = static_cast<int>(count + 1) % world;
  const bool arena = on_arena(where, rank, world);
  const std::size_t size = size_of(dtype), bytes = count * size;
  const auto numbers = [&](int of, std::size_t begin, std::size_t n) {
    std::vector<char> made(n * size + 1);
    fill(dtype, made.data(), begin, n, of, ReduceOp::sum);
    return made;
  };
  Memory mine(group, bytes, arena), all(group, world * bytes, arena);
  std::vector<void*> parts(world);
  std::vector<const void*> ins(world);
  std::vector<std::size_t> counts(world, count);
  for (int r = 0; r < world; ++r) ins[r] = parts[r] = all.data() + r * bytes;

  fill(dtype, mine.data(), 0, count, rank, ReduceOp::sum);
  group.broadcast(mine.data(), count, dtype, root);
  claim_same(mine.data(), numbers(root, 0, count).data(), bytes, "broadcast", rank);

  fill(dtype, mine.data(), 0, count, rank, ReduceOp::sum);
  group.all_gather(mine.data(), all.data(), count, dtype);
  for (int r = 0; r < world; ++r) claim_same(parts[r], numbers(r, 0, count).data(), bytes, "all_gather", rank);
  std::memset(all.data(), 0x11, world * bytes);
  fill(dtype, static_cast<char*>(parts[rank]), 0, count, rank, ReduceOp::sum);
  group.all_gather(parts[rank], all.data(), count, dtype);
  for (int r = 0; r < world; ++r) claim_same(parts[r], numbers(r, 0, count).data(), bytes, "all_gather in place", rank);
  std::memset(all.data(), 0x11, world * bytes);
  Memory elsewhere(group, bytes, false);  // inputs beside the arena, outputs on it: these are written from outside
  fill(dtype, elsewhere.data(), 0, count, rank, ReduceOp::sum);
  group.all_gather(elsewhere.data(), all.data(), count, dtype);
  for (int r = 0; r < world; ++r) claim_same(parts[r], numbers(r, 0, count).data(), bytes, "all_gather outwards", rank);

  std::memset(all.data(), 0x11, world * bytes);
  for (int r = 0; r < world; ++r) counts[r] = count * r / world;
  group.all_gather(mine.data(), parts.data(), counts.data(), dtype);
  for (int r = 0; r < world; ++r) {
    claim_same(parts[r], numbers(r, 0, counts[r]).data(), counts[r] * size, "uneven all_gather", rank);
  }

  std::memset(all.data(), 0x11, world * bytes);
  group.gather(mine.data(), rank == root ? parts.data() : nullptr, count, dtype, root);
  for (int r = 0; r < world; ++r) {
    const std::vector<char> expected = rank == root ? numbers(r, 0, count) : std::vector<char>(bytes + 1, 0x11);
    claim_same(parts[r], expected.data(), bytes, "gather", rank);
  }

  for (int r = 0; r < world; ++r) fill(dtype, static_cast<char*>(parts[r]), r * count, count, rank, ReduceOp::sum);
  group.scatter(rank == root ? ins.data() : nullptr, mine.data(), count, dtype, root);
  claim_same(mine.data(), numbers(root, rank * count, count).data(), bytes, "scatter", rank);

  // Rank a sends count * (a + b) / (2 world) numbers to rank b.
  Memory received(group, world * bytes, arena);
  std::vector<std::size_t> sends(world), receives(world);
  std::vector<void*> outs(world);
  for (int r = 0; r < world; ++r) {
    sends[r] = receives[r] = count * (rank + r) / (2 * world);
    outs[r] = received.data() + r * bytes;
  }
  group.all_to_all(ins.data(), sends.data(), outs.data(), receives.data(), dtype);
  for (int r = 0; r < world; ++r) {
    claim_same(outs[r], numbers(r, rank * count, receives[r]).data(), receives[r] * size, "all_to_all", rank);
  }
  group.barrier();
}
