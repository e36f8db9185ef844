// The collectives that only move.
#include "shm_inside.hpp"
#include "shm_pieces.hpp"

namespace shoal {
namespace {

const char* at(const void* base, std::size_t offset) { return static_cast<const char*>(base) + offset; }
char* at(void* base, std::size_t offset) { return static_cast<char*>(base) + offset; }

constexpr std::size_t kAhead = 4;  // pieces that a sender may be ahead of its receivers
// Where everyone sends and receives: at step t all have published step t - 1, so have ended step t - 2, in which they
// read piece t - 3.
constexpr std::size_t kDepth = 3;

// From rank r everyone (or the root) takes bytes[r], at outs[r].
struct Gathering {
  void* const* outs;  // null: takes nothing
  const std::size_t* bytes;
  std::size_t most;
};

// All that is taken lies on the arenas, or all that is given: `pull` from there, or `push` to there.
void pull(Call& call, const Gathering& g, const void* in) {
  if (g.outs) {
    for (int step = 0; step < call.world; ++step) {
      const int r = (call.rank + step) % call.world;  // not all from the same rank at the same time
      copy(g.outs[r], r == call.rank ? in : call.inside.segment.at(call.signature_of(r).in_offset), g.bytes[r]);
    }
  }
  call.publish(2);
  call.wait(2);
  call.zero_copy();
}

void push(Call& call, const Gathering& g, const void* in) {
  for (int step = 0; step < call.world; ++step) {
    const int r = (call.rank + step) % call.world;
    copy(r == call.rank ? g.outs[r] : call.inside.segment.at(call.table(r)[call.rank]), in, g.bytes[call.rank]);
  }
  call.publish(2);
  call.wait(2);
  call.zero_copy();
}

void gather_to(Call& call, const void* in, const Gathering& g) {
  Segment& segment = call.inside.segment;
  const int world = call.world, self = call.rank;
  if (g.most <= segment.layout().opening_bytes) {
    copy(call.opening(self), in, g.bytes[self]);
    call.open();
    for (int r = 0; r < world && g.outs; ++r) copy(g.outs[r], r == self ? in : call.opening(r), g.bytes[r]);
    return;
  }
  call.signature.in_offset = segment.offset_of(in, g.bytes[self]);
  call.signature.flags = call.signature.in_offset || !g.bytes[self] ? kInOnArena : 0;
  bool out_there = g.outs != nullptr && call.signature.op == Op::all_gather;
  for (int r = 0; r < world && out_there; ++r) {
    call.table(self)[r] = segment.offset_of(g.outs[r], g.bytes[r]);
    out_there = call.table(self)[r] || !g.bytes[r];
  }
  if (out_there) call.signature.flags |= kOutOnArena;
  call.open();
  if (call.all(kInOnArena)) return pull(call, g, in);
  if (call.all(kOutOnArena)) return push(call, g, in);
  const std::size_t room = lines_in(segment.layout().pipe_bytes / kDepth);
  const Pieces longest(g.most, room);
  const auto piece_of = [&](int r, std::size_t index) {
    const std::size_t begin = index * longest.each < g.bytes[r] ? index * longest.each : g.bytes[r];
    return Range{begin, begin + longest.each < g.bytes[r] ? begin + longest.each : g.bytes[r]};
  };
  for (std::size_t t = 0; t <= longest.count; ++t) {
    if (t > 0) call.wait(1 + t);
    if (t < longest.count) {
      const Range piece = piece_of(self, t);
      if (call.signature.root != self) {
        copy(segment.pipe(self) + t % kDepth * room, at(in, piece.begin), piece.size());
      }
      call.publish(2 + t);
    }
    if (t > 0 && g.outs) {
      for (int r = 0; r < world; ++r) {
        const Range piece = piece_of(r, t - 1);
        const char* from = r == self ? at(in, piece.begin) : segment.pipe(r) + (t - 1) % kDepth * room;
        copy(at(g.outs[r], piece.begin), from, piece.size());
      }
    }
  }
}

}  // namespace

void ShmGroup::broadcast(void* data, std::size_t count, DType dtype, int root, double timeout_s) {
  const std::size_t bytes = count * size_of(dtype);
  Segment& segment = inside_->segment;
  Call call(*inside_, signature_for(Op::broadcast, dtype, count, ReduceOp::sum, root), bytes, timeout_s);
  const bool sends = root == call.rank;
  if (bytes <= segment.layout().opening_bytes) {
    if (sends) copy(call.opening(root), data, bytes);
    call.open();
    if (!sends) copy(data, call.opening(root), bytes);
    return;
  }
  call.signature.in_offset = sends ? segment.offset_of(data, bytes) : 0;
  call.open();
  if (const std::uint64_t source = call.signature_of(root).in_offset) {
    if (!sends) copy(data, segment.at(source), bytes);
    call.publish(2);
    if (sends) call.wait(2);  // until all have read it
    return call.zero_copy();
  }
  const std::size_t room = lines_in(segment.layout().pipe_bytes / kAhead);
  const Pieces pieces(bytes, room);
  for (std::size_t t = 0; t < pieces.count; ++t) {
    char* buffer = segment.pipe(root) + t % kAhead * room;
    const Range piece = pieces[t];
    if (sends) {
      if (t >= kAhead) call.wait(2 + t - kAhead);
      copy(buffer, at(data, piece.begin), piece.size());
    } else {
      call.wait(2 + t, root);
      copy(at(data, piece.begin), buffer, piece.size());
    }
    call.publish(2 + t);
  }
}

void ShmGroup::all_gather(const void* in, void* out, std::size_t count, DType dtype, double timeout_s) {
  std::array<void*, kMostRanks> outs;
  std::array<std::size_t, kMostRanks> counts;
  for (int r = 0; r < world(); ++r) {
    outs[r] = at(out, r * count * size_of(dtype));
    counts[r] = count;
  }
  all_gather(in, outs.data(), counts.data(), dtype, timeout_s);
}

void ShmGroup::all_gather(const void* in, void* const* outs, const std::size_t* counts, DType dtype,
                          double timeout_s) {
  std::array<std::size_t, kMostRanks> bytes;
  std::size_t count = 0, most = 0;
  for (int r = 0; r < world(); ++r) {
    bytes[r] = counts[r] * size_of(dtype);
    count += counts[r];
    most = bytes[r] > most ? bytes[r] : most;
  }
  Call call(*inside_, signature_for(Op::all_gather, dtype, count), count * size_of(dtype), timeout_s);
  call.signature.shape = digest_of(counts, world());
  gather_to(call, in, {outs, bytes.data(), most});
}

void ShmGroup::gather(const void* in, void* const* outs, std::size_t count, DType dtype, int root, double timeout_s) {
  std::array<std::size_t, kMostRanks> bytes;
  bytes.fill(count * size_of(dtype));
  Call call(*inside_, signature_for(Op::gather, dtype, count, ReduceOp::sum, root), bytes[0] * world(), timeout_s);
  gather_to(call, in, {root == call.rank ? outs : nullptr, bytes.data(), bytes[0]});
}

void ShmGroup::scatter(const void* const* ins, void* out, std::size_t count, DType dtype, int root,
                       double timeout_s) {
  const std::size_t bytes = count * size_of(dtype);
  Segment& segment = inside_->segment;
  Call call(*inside_, signature_for(Op::scatter, dtype, count, ReduceOp::sum, root), bytes * world(), timeout_s);
  const int world = call.world, self = call.rank;
  const bool sends = root == self;
  const std::size_t small = lines_in(segment.layout().opening_bytes / world);
  if (bytes <= small) {
    for (int r = 0; sends && r < world; ++r) {
      if (r != self) copy(call.opening(self) + r * small, ins[r], bytes);
    }
    call.open();
    copy(out, sends ? ins[self] : call.opening(root) + self * small, bytes);
    return;
  }
  call.signature.flags = sends ? kInOnArena : 0;
  for (int r = 0; sends && r < world; ++r) {
    call.table(self)[r] = segment.offset_of(ins[r], bytes);
    if (!call.table(self)[r]) call.signature.flags = 0;
  }
  call.open();
  if (call.signature_of(root).flags & kInOnArena) {
    copy(out, sends ? ins[self] : segment.at(call.table(root)[self]), bytes);
    call.publish(2);
    if (sends) call.wait(2);
    return call.zero_copy();
  }
  const std::size_t room = lines_in(segment.layout().pipe_bytes / kAhead / world);
  const Pieces pieces(bytes, room);
  for (std::size_t t = 0; t < pieces.count; ++t) {
    char* buffer = segment.pipe(root) + t % kAhead * world * room;
    const Range piece = pieces[t];
    if (sends) {
      if (t >= kAhead) call.wait(2 + t - kAhead);
      for (int r = 0; r < world; ++r) {
        copy(r == self ? at(out, piece.begin) : buffer + r * room, at(ins[r], piece.begin), piece.size());
      }
    } else {
      call.wait(2 + t, root);
      copy(at(out, piece.begin), buffer + self * room, piece.size());
    }
    call.publish(2 + t);
  }
}

// The table of a rank: what it sends to each (elements), what it expects from each, where its inputs lie.
void ShmGroup::all_to_all(const void* const* ins, const std::size_t* send_counts, void* const* outs,
                          const std::size_t* receive_counts, DType dtype, double timeout_s) {
  const std::size_t size = size_of(dtype);
  Segment& segment = inside_->segment;
  std::size_t sent = 0, most = 0;
  for (int r = 0; r < world(); ++r) {
    sent += send_counts[r];
    most = send_counts[r] > most ? send_counts[r] : most;
  }
  Call call(*inside_, signature_for(Op::all_to_all, dtype, 0), sent * size, timeout_s);
  const int world = call.world, self = call.rank;
  const std::size_t small = lines_in(segment.layout().opening_bytes / world);
  std::uint64_t* table = call.table(self);
  call.signature.flags = kInOnArena | kFits;
  for (int r = 0; r < world; ++r) {
    table[r] = send_counts[r];
    table[world + r] = receive_counts[r];
    table[2 * world + r] = segment.offset_of(ins[r], send_counts[r] * size);
    if (send_counts[r] && !table[2 * world + r]) call.signature.flags &= ~kInOnArena;
  }
  call.signature.in_offset = most;  // no offset: the longest of this rank's
  if (most * size > small) call.signature.flags &= ~kFits;
  if (call.signature.flags & kFits) {
    for (int r = 0; r < world; ++r) {
      if (r != self) copy(call.opening(self) + r * small, ins[r], send_counts[r] * size);
    }
  }
  call.open();
  call.compare_pairs();
  const auto take_all = [&](auto&& from) {
    for (int step = 0; step < world; ++step) {
      const int r = (self + step) % world;
      if (receive_counts[r]) copy(outs[r], r == self ? ins[r] : from(r), receive_counts[r] * size);
    }
  };
  if (call.all(kFits)) return take_all([&](int r) { return call.opening(r) + self * small; });
  if (call.all(kInOnArena)) {
    take_all([&](int r) { return segment.at(call.table(r)[2 * world + self]); });
    call.publish(2);
    call.wait(2);
    return call.zero_copy();
  }
  for (int r = 0; r < world; ++r) {
    most = call.signature_of(r).in_offset > most ? call.signature_of(r).in_offset : most;
  }
  copy(outs[self], ins[self], send_counts[self] * size);
  const std::size_t room = lines_in(segment.layout().pipe_bytes / kDepth / world);
  const Pieces longest(most * size, room);
  const auto piece_of = [&](std::size_t bytes, std::size_t index) {
    const std::size_t begin = index * longest.each < bytes ? index * longest.each : bytes;
    return Range{begin, begin + longest.each < bytes ? begin + longest.each : bytes};
  };
  const auto buffer = [&](int r, std::size_t piece, int part) {
    return segment.pipe(r) + (piece % kDepth * world + part) * room;
  };
  for (std::size_t t = 0; t <= longest.count; ++t) {
    if (t > 0) call.wait(1 + t);
    if (t < longest.count) {
      for (int r = 0; r < world; ++r) {
        const Range piece = piece_of(send_counts[r] * size, t);
        if (r != self) copy(buffer(self, t, r), at(ins[r], piece.begin), piece.size());
      }
      call.publish(2 + t);
    }
    for (int r = 0; t > 0 && r < world; ++r) {
      const Range piece = piece_of(receive_counts[r] * size, t - 1);
      if (r != self) copy(at(outs[r], piece.begin), buffer(r, t - 1, self), piece.size());
    }
  }
}

}  // namespace shoal
