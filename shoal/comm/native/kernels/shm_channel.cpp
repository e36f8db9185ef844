#include "shm_channel.hpp"

#include <algorithm>
#include <cstring>

#include "shm_pieces.hpp"

namespace shoal {
namespace {
constexpr std::size_t kPiece = 256 << 10;  // after so many bytes the other side may begin with them
}

Channels::Ring Channels::ring(int from, int to) const {
  char* words = static_cast<char*>(memory_) + (from * inside_.world + to) * (sizeof(Words) + room_);
  return {*reinterpret_cast<Words*>(words), words + sizeof(Words)};
}

void Channels::wait(const std::function<bool()>& ready, std::atomic<std::uint32_t>& sleeps, int whom,
                    const char* what) {
  if (ready()) return;
  const Waiter::Outcome outcome = inside_.waiter.wait_for(ready, sleeps, whom);
  if (outcome == Waiter::Outcome::reached) return;
  const std::string where = std::string(what) + " in group '" + inside_.options.name + "', " +
                            inside_.called(inside_.rank) + ": ";
  if (outcome == Waiter::Outcome::left) {
    throw Failure(Failure::dead_peer, where + inside_.position_of(whom) + " has left the group");
  }
  throw Failure(static_cast<Failure::Kind>(inside_.segment.header().abort_kind.load()), where + inside_.abort_text());
}

void Channels::wake(std::atomic<std::uint32_t>& sleeps, int whom) const {
  if (sleeps.load(std::memory_order_seq_cst) && sleeps.exchange(0)) inside_.waiter.ring(whom);
}

void Channels::put(const Ring& ring, const void* head, const void* data, std::size_t bytes, int to) {
  std::uint64_t written = ring.words.written.load(std::memory_order_relaxed);
  const std::size_t all = kHead + bytes;
  // Nobody reads in an empty ring; who sees what is written next sees this too.
  if (ring.words.read.load(std::memory_order_seq_cst) == written) ring.words.base.store(written);
  for (std::size_t done = 0; done < all;) {
    const auto room = [&] { return room_ - (written - ring.words.read.load(std::memory_order_seq_cst)); };
    wait([&] { return room() > 0; }, ring.words.sleeps[0], to, "send");
    const bool in_head = done < kHead;
    const char* from = in_head ? static_cast<const char*>(head) + done : static_cast<const char*>(data) + done - kHead;
    const std::size_t at = (written - ring.words.base.load(std::memory_order_relaxed)) % room_;
    const std::size_t piece = std::min({(in_head ? kHead : all) - done, room(), room_ - at, kPiece});
    copy(ring.bytes + at, from, piece);
    done += piece;
    written += piece;
    if (done <= kHead && bytes) continue;  // the head goes with the first bytes: one wake-up for a small message
    ring.words.written.store(written, std::memory_order_seq_cst);
    wake(ring.words.sleeps[1], to);
  }
}

void Channels::take(const Ring& ring, void* data, std::size_t bytes, int from) {
  std::uint64_t read = ring.words.read.load(std::memory_order_relaxed);
  for (std::size_t done = 0; done < bytes;) {
    const auto there = [&] { return ring.words.written.load(std::memory_order_seq_cst) - read; };
    wait([&] { return there() > 0; }, ring.words.sleeps[1], from, "receive");
    const std::size_t at = (read - ring.words.base.load(std::memory_order_relaxed)) % room_;
    const std::size_t piece = std::min<std::size_t>({bytes - done, there(), room_ - at, kPiece});
    if (data) copy(static_cast<char*>(data) + done, ring.bytes + at, piece);
    done += piece;
    read += piece;
    ring.words.read.store(read, std::memory_order_seq_cst);
    wake(ring.words.sleeps[0], from);
  }
}

void Channels::send(const void* head, const void* data, std::size_t bytes, int to) {
  inside_.waiter.note_core();
  put(ring(inside_.rank, to), head, data, bytes, to);
}

bool Channels::receive(const void* head, void* data, std::size_t bytes, int from, void* came) {
  inside_.waiter.note_core();
  const Ring from_there = ring(from, inside_.rank);
  take(from_there, came, kHead, from);
  std::uint64_t follow;
  std::memcpy(&follow, came, sizeof follow);
  const bool expected = std::memcmp(head, came, kHead) == 0 && follow == bytes;
  take(from_there, expected ? data : nullptr, follow, from);
  return expected;
}

}  // namespace shoal
