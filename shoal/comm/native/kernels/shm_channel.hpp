// Messages from one rank to another: a ring of bytes for each ordered pair, over memory that the ranks share.
//
// A message is a head of kHead bytes, which tells how many bytes follow, and these. A sender goes on as soon as the
// last byte is in the ring: it waits only where more than the ring holds is under way. Rings may be large: an empty one
// is filled from its beginning, so that no more memory is touched than was ever under way. Each ring has one sending and
// one receiving thread at a time. What ends collectives ends these waits too; both sleep on the bell of their rank.
#pragma once

#include "shm_inside.hpp"

namespace shoal {

class Channels {
 public:
  static constexpr std::size_t kHead = kLine;
  static std::size_t bytes(int world, std::size_t room) { return world * world * (sizeof(Words) + room); }

  // memory: that many bytes, zero at first, the same for all ranks. room: bytes of a ring, a multiple of the line.
  Channels(ShmGroup::Inside& inside, void* memory, std::size_t room) : inside_(inside), memory_(memory), room_(room) {}

  void send(const void* head, const void* data, std::size_t bytes, int to);
  // Where the head that comes is the one expected, its data; else false, the head in `came`, and no data written.
  bool receive(const void* head, void* data, std::size_t bytes, int from, void* came);

 private:
  struct Words {
    alignas(kLine) std::atomic<std::uint64_t> written;  // bytes since the beginning; the sender writes it
    std::atomic<std::uint64_t> base;                    // which of them lies at the beginning of the ring; likewise
    alignas(kLine) std::atomic<std::uint64_t> read;     // the receiver writes it
    alignas(kLine) std::atomic<std::uint32_t> sleeps[2];  // the sender, the receiver
  };
  struct Ring {
    Words& words;
    char* bytes;
  };
  Ring ring(int from, int to) const;
  void put(const Ring&, const void* head, const void* data, std::size_t bytes, int to);
  void take(const Ring&, void* data, std::size_t bytes, int from);  // data: null to let them go by
  void wait(const std::function<bool()>& ready, std::atomic<std::uint32_t>& sleeps, int whom, const char* what);
  void wake(std::atomic<std::uint32_t>& sleeps, int whom) const;
  ShmGroup::Inside& inside_;
  void* memory_;
  std::size_t room_;
};

}  // namespace shoal
