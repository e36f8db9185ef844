// The memory file that the ranks of a group share: what lies where, and the words they speak through.
//
//   [header | control of each rank | slot of each rank | arena of each rank (sparse)]
//
// A rank's progress is one word that only it writes and that only grows, on a cache line of its own with the signature
// of the operation. Words are published by a release (seq_cst where a sleeper may have to be woken) and read by an
// acquire, everything else lies behind that edge: nothing relies on the order that x86 would give for free.
#pragma once

#include <atomic>

#include "shm_types.hpp"

namespace shoal {

constexpr std::size_t kLine = 128;  // two cache lines: they are fetched in pairs, and ARM has machines of 128 bytes
constexpr int kMostWords = 4;       // of the bitmap of sleepers

// What a rank asks for. All ranks' must be equal, except for flags and offsets.
struct Signature {
  Op op;
  DType dtype;
  ReduceOp reduce;
  std::uint8_t flags;
  std::int32_t root;
  std::uint64_t count;       // elements of the full buffer
  std::uint64_t shape;       // digest of uneven counts
  std::uint64_t in_offset;   // in the memory file, where flags say so
  std::uint64_t out_offset;
  std::uint64_t words;       // digest of what the callers say beside it, 0 where they say nothing: shapes, say
  bool agrees(const Signature& o) const {
    return op == o.op && dtype == o.dtype && reduce == o.reduce && root == o.root && count == o.count &&
           shape == o.shape && words == o.words;
  }
};
enum Flag : std::uint8_t { kInOnArena = 1, kOutOnArena = 2, kFits = 4 };

// Sequence (36 bits), step within the operation (24), operation (4): grows with each.
constexpr std::uint64_t at_of(std::uint64_t sequence, std::uint64_t step, Op op = Op(0)) {
  return sequence << 28 | step << 4 | static_cast<std::uint64_t>(op);
}
constexpr std::uint64_t sequence_of(std::uint64_t at) { return at >> 28; }
constexpr std::uint64_t step_of(std::uint64_t at) { return at >> 4 & 0xffffff; }
constexpr Op op_of(std::uint64_t at) { return static_cast<Op>(at & 15); }
constexpr std::uint64_t kMostSteps = 0xffffff;

// Operations of even and of odd sequence have a line each: a rank that is one operation ahead must not overwrite what
// others still compare. It cannot be two ahead, for each operation begins by waiting for all ranks to enter it.
struct alignas(kLine) Progress {
  std::atomic<std::uint64_t> at;
  Signature signature;
};

struct alignas(kLine) Bell {  // where a rank sleeps, and what for
  std::atomic<std::uint32_t> rings;
  std::atomic<std::int32_t> whom;  // the rank waited for; -1: all others
  std::atomic<std::uint64_t> target;
};

struct alignas(kLine) Member {
  std::atomic<std::uint32_t> pid;
  std::atomic<std::uint32_t> joined;  // 1: here; 2: left
  std::atomic<std::uint64_t> mapped;  // bytes of each arena that it could map
  std::atomic<std::int32_t> core;     // on which it was seen last
};

struct Control {
  Progress progress[2];
  Bell bell;
  Member member;
};

struct Header {
  std::atomic<std::uint64_t> layout;  // digest of what all must have said the same
  alignas(kLine) std::atomic<std::uint64_t> sleepers[kMostWords];
  alignas(kLine) std::atomic<std::uint32_t> aborted;  // 1: being written; 2: the rest can be read
  std::atomic<std::int32_t> abort_kind;
  std::int32_t text_length;
  char text[400];
};

struct Layout {
  Layout(int world, const Options&);
  int world;
  std::size_t control_offset, table_offset, slot_offset, arena_offset;
  std::size_t table_bytes;    // of a rank and parity: 3 * world numbers
  std::size_t opening_bytes;  // of a slot, for each parity: may be written before all have entered
  std::size_t pipe_bytes;     // the rest of the slot: only once all have
  std::size_t slot_bytes, arena_bytes, total_bytes;
  std::uint64_t digest() const;
};

class Segment {
 public:
  // mapping: the whole file, and arenas where they lie elsewhere; null: maps it itself
  Segment(int memfd, int rank, const Layout&, void* mapping, const std::vector<char*>& arenas);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  const Layout& layout() const { return layout_; }
  int rank() const { return rank_; }
  int world() const { return layout_.world; }
  Header& header() const { return *reinterpret_cast<Header*>(base_); }
  Control& control(int rank) const {
    return *reinterpret_cast<Control*>(base_ + layout_.control_offset + rank * sizeof(Control));
  }
  Progress& progress(int rank, std::uint64_t sequence) const { return control(rank).progress[sequence & 1]; }
  std::uint64_t* table(int rank, std::uint64_t sequence) const {
    return reinterpret_cast<std::uint64_t*>(base_ + layout_.table_offset +
                                            (2 * rank + (sequence & 1)) * layout_.table_bytes);
  }
  char* opening(int rank, std::uint64_t sequence) const {
    return slot(rank) + (sequence & 1) * layout_.opening_bytes;
  }
  char* pipe(int rank) const { return slot(rank) + 2 * layout_.opening_bytes; }

  std::size_t mapped() const { return mapped_; }  // of each arena, here
  char* arena(int rank) const { return arenas_[rank]; }
  // The bytes at an offset of the memory file, which lies on an arena.
  char* at(std::uint64_t offset) const {
    const std::uint64_t within = offset - layout_.arena_offset;
    return arenas_[within / layout_.arena_bytes] + within % layout_.arena_bytes;
  }
  // Offset of memory on this rank's arena; 0 where it is elsewhere.
  std::uint64_t offset_of(const void* memory, std::size_t bytes) const;
  bool reserve(std::size_t begin, std::size_t bytes) const;   // make a part of this rank's arena really there
  void give_back(std::size_t begin, std::size_t bytes) const;

 private:
  char* slot(int rank) const { return base_ + layout_.slot_offset + rank * layout_.slot_bytes; }
  Layout layout_;
  int rank_;
  int memfd_;
  bool own_;
  char* base_ = nullptr;
  std::vector<char*> arenas_;
  std::size_t mapped_ = 0;
};

}  // namespace shoal
