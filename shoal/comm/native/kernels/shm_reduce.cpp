// The collectives that add up.
#include "shm_combine.hpp"
#include "shm_inside.hpp"
#include "shm_pieces.hpp"

namespace shoal {
namespace {

using Pointers = std::array<const void*, ShmGroup::kMostRanks>;
using Outputs = std::array<void*, ShmGroup::kMostRanks>;

// How far the stages of a pipeline are apart: while a rank is one piece ahead, nobody waits for anybody.
// A rank that starts step t knows that all others have published step t - lag, so have ended step t - lag - 1, in which
// they read piece t - 2 lag - 1 for the last time: its buffer is free again.
constexpr std::size_t kLag = 1;
constexpr std::size_t kDepth = 2 * kLag + 1;  // buffers of a slot

void combine_bytes(const Signature& s, const Outputs& outs, int out_count, const Pointers& ins, int world,
                   std::size_t bytes) {
  combine(s.dtype, s.reduce, outs.data(), out_count, ins.data(), world, bytes / size_of(s.dtype));
}

const char* at(const void* base, std::size_t offset) { return static_cast<const char*>(base) + offset; }
char* at(void* base, std::size_t offset) { return static_cast<char*>(base) + offset; }

// Everyone puts everything into its slot and adds up all slots: one synchronisation. `out` null: does not want it.
void one_shot(Call& call, const void* in, void* out, std::size_t bytes) {
  copy(call.opening(call.rank), in, bytes);
  call.open();
  if (!out || !bytes) return;
  Pointers ins;
  for (int r = 0; r < call.world; ++r) ins[r] = r == call.rank ? in : call.opening(r);
  combine_bytes(call.signature, {out}, 1, ins, call.world, bytes);
}

// Each rank adds up its part of every piece, and the others fetch it: reduce-scatter and all-gather in one pipeline.
// Step t of a rank: piece t lies in its slot, its part of piece t - lag is summed, piece t - 2 lag is fetched.
// Tried with 2 ranks, and no better: whole pieces exchanged and summed by both (as fast in f32, 1.5 times as long in
// bf16), prefetching the others' slots by 4 to 128 KiB (nothing). What is left is the way between the cores' caches.
void by_parts(Call& call, const void* in, void* out, std::size_t bytes) {
  Segment& segment = call.inside.segment;
  const int world = call.world, self = call.rank;
  const std::size_t room = lines_in(segment.layout().pipe_bytes / kDepth / world);  // of a part
  const Pieces pieces(bytes, room * world);
  const auto buffer = [&](int r, std::size_t piece, int part) {
    return segment.pipe(r) + (piece % kDepth * world + part) * room;
  };
  for (std::size_t t = 0; t < pieces.count + 2 * kLag; ++t) {
    if (t >= kLag) call.wait(2 + t - kLag);
    if (t < pieces.count) {
      for (int p = 0; p < world; ++p) {
        const Range part = part_of(pieces[t], p, world);
        if (p != self) copy(buffer(self, t, p), at(in, part.begin), part.size());
      }
    }
    if (t >= kLag && t - kLag < pieces.count) {
      const Range part = part_of(pieces[t - kLag], self, world);
      Pointers ins;
      for (int r = 0; r < world; ++r) ins[r] = r == self ? at(in, part.begin) : buffer(r, t - kLag, self);
      // Summed where only this core writes, then copied: lines that others have read are slow to write one by one.
      void* slot = buffer(self, t - kLag, self);
      void* sum = out ? at(out, part.begin) : slot;
      combine_bytes(call.signature, {sum}, 1, ins, world, part.size());
      copy(slot, sum, part.size());
    }
    if (t < pieces.count + kLag) call.publish(2 + t);
    if (t >= 2 * kLag && out) {
      for (int p = 0; p < world; ++p) {
        const Range part = part_of(pieces[t - 2 * kLag], p, world);
        if (p != self) copy(at(out, part.begin), buffer(p, t - 2 * kLag, p), part.size());
      }
    }
  }
}

// All tensors lie on the arenas: each rank adds up its part where it lies, and writes it into all copies.
void in_place(Call& call, const void* in, std::size_t bytes, int root) {
  Segment& segment = call.inside.segment;
  const Range part = part_of({0, bytes}, call.rank, call.world);
  Pointers ins;
  Outputs outs;
  int out_count = 0;
  for (int step = 0; step < call.world; ++step) {
    const int r = (call.rank + step) % call.world;  // own first: it is written one by one, the others by copies of it
    const Signature& theirs = call.signature_of(r);
    ins[r] = r == call.rank ? at(in, part.begin) : segment.at(theirs.in_offset + part.begin);
    if (root < 0 || r == root) outs[out_count++] = segment.at(theirs.out_offset + part.begin);
  }
  combine_bytes(call.signature, outs, out_count, ins, call.world, part.size());
  call.publish(2);
  call.wait(2);
  call.zero_copy();
}

// root < 0: all get the sum.
void reduce_to(Call& call, const void* in, void* out, std::size_t bytes, int root) {
  Segment& segment = call.inside.segment;
  void* wanted = root < 0 || root == call.rank ? out : nullptr;
  // One-shot work grows with the square of the ranks: from four on, the limit is lower.
  const std::size_t opening = segment.layout().opening_bytes;
  if (bytes <= opening && bytes <= 2 * opening / call.world) return one_shot(call, in, wanted, bytes);
  call.signature.in_offset = segment.offset_of(in, bytes);
  call.signature.out_offset = wanted ? segment.offset_of(wanted, bytes) : 0;
  const bool out_there = !wanted || call.signature.out_offset;
  call.signature.flags = (call.signature.in_offset ? kInOnArena : 0) | (out_there ? kOutOnArena : 0);
  call.open();
  if (call.world == 1) return combine_bytes(call.signature, {out}, 1, {in}, 1, bytes);
  if (call.all(kInOnArena | kOutOnArena)) return in_place(call, in, bytes, root);
  by_parts(call, in, wanted, bytes);
}

}  // namespace

void ShmGroup::all_reduce(const void* in, void* out, std::size_t count, DType dtype, ReduceOp op, double timeout_s) {
  const std::size_t bytes = count * size_of(dtype);
  Call call(*inside_, signature_for(Op::all_reduce, dtype, count, op), bytes, timeout_s);
  reduce_to(call, in, out, bytes, -1);
}

void ShmGroup::reduce(const void* in, void* out, std::size_t count, DType dtype, ReduceOp op, int root,
                      double timeout_s) {
  const std::size_t bytes = count * size_of(dtype);
  Call call(*inside_, signature_for(Op::reduce, dtype, count, op, root), bytes, timeout_s);
  reduce_to(call, in, out, bytes, root);
}

void ShmGroup::reduce_scatter(const void* in, void* out, std::size_t count, DType dtype, ReduceOp op,
                              double timeout_s) {
  Pointers ins;
  std::array<std::size_t, kMostRanks> counts;
  for (int r = 0; r < world(); ++r) {
    ins[r] = at(in, r * count * size_of(dtype));
    counts[r] = count;
  }
  reduce_scatter(ins.data(), out, counts.data(), dtype, op, timeout_s);
}

void ShmGroup::reduce_scatter(const void* const* ins, void* out, const std::size_t* counts, DType dtype, ReduceOp op,
                              double timeout_s) {
  const int world = inside_->world, self = inside_->rank;
  const std::size_t size = size_of(dtype);
  Segment& segment = inside_->segment;
  std::size_t count = 0, most = 0;
  for (int r = 0; r < world; ++r) {
    count += counts[r];
    most = counts[r] > most ? counts[r] : most;
  }
  Call call(*inside_, signature_for(Op::reduce_scatter, dtype, count, op), count * size, timeout_s);
  call.signature.shape = digest_of(counts, world);
  Pointers mine;
  // Small: the others' parts lie side by side in the slot.
  const std::size_t opening_room = lines_in(segment.layout().opening_bytes / world);
  if (most * size <= opening_room) {
    for (int p = 0; p < world; ++p) {
      if (p != self) copy(call.opening(self) + p * opening_room, ins[p], counts[p] * size);
    }
    call.open();
    for (int r = 0; r < world; ++r) mine[r] = r == self ? ins[self] : call.opening(r) + self * opening_room;
    combine_bytes(call.signature, {out}, 1, mine, world, counts[self] * size);
    return;
  }
  call.signature.flags = kInOnArena;
  for (int p = 0; p < world; ++p) {
    const std::uint64_t offset = segment.offset_of(ins[p], counts[p] * size);
    call.table(self)[p] = offset;
    if (!offset && counts[p]) call.signature.flags = 0;
  }
  call.open();
  if (call.all(kInOnArena)) {
    for (int r = 0; r < world; ++r) mine[r] = r == self || !counts[self] ? ins[self] : segment.at(call.table(r)[self]);
    combine_bytes(call.signature, {out}, 1, mine, world, counts[self] * size);
    call.publish(2);  // the inputs are theirs again once all have read them
    call.wait(2);
    return call.zero_copy();
  }
  const std::size_t room = lines_in(segment.layout().pipe_bytes / kDepth / world);
  const Pieces longest(most * size, room);
  const auto piece_of = [&](int part, std::size_t index) {
    const std::size_t bytes = counts[part] * size, begin = index * longest.each < bytes ? index * longest.each : bytes;
    return Range{begin, begin + longest.each < bytes ? begin + longest.each : bytes};
  };
  const auto buffer = [&](int r, std::size_t piece, int part) {
    return segment.pipe(r) + (piece % kDepth * world + part) * room;
  };
  for (std::size_t t = 0; t < longest.count + kLag; ++t) {
    if (t >= kLag) call.wait(2 + t - kLag);
    if (t < longest.count) {
      for (int p = 0; p < world; ++p) {
        const Range piece = piece_of(p, t);
        if (p != self) copy(buffer(self, t, p), at(ins[p], piece.begin), piece.size());
      }
      call.publish(2 + t);
    }
    if (t >= kLag) {
      const Range piece = piece_of(self, t - kLag);
      for (int r = 0; r < world; ++r) mine[r] = r == self ? at(ins[self], piece.begin) : buffer(r, t - kLag, self);
      combine_bytes(call.signature, {at(out, piece.begin)}, 1, mine, world, piece.size());
    }
  }
}

}  // namespace shoal
