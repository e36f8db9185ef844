// Which parts of this rank's arena are in use.
#pragma once

#include <map>
#include <mutex>

#include "shm_segment.hpp"

namespace shoal {

// First fit from the lowest address, so that what is in use stays low. Memory below `backed` is really there; what was
// given back is kept for the next one, up to kKept bytes beyond the last block in use.
class Arena {
 public:
  explicit Arena(const Segment& segment) : segment_(segment) {}
  void* allocate(std::size_t bytes, std::size_t room);  // null: no room, or no memory
  bool release(void* memory);                           // false: not in use
  static constexpr std::size_t kKept = 256ull << 20;

 private:
  const Segment& segment_;
  std::mutex mutex_;
  std::map<std::size_t, std::size_t> used_;  // begin -> bytes
  std::size_t backed_ = 0;
};

}  // namespace shoal
