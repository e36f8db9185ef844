#include "shm_arena.hpp"

namespace shoal {
namespace {
constexpr std::size_t kPage = 4096;
std::size_t up(std::size_t bytes, std::size_t to) { return (bytes + to - 1) / to * to; }
}  // namespace

void* Arena::allocate(std::size_t bytes, std::size_t room) {
  if (bytes > room) return nullptr;
  const std::size_t size = up(bytes ? bytes : 1, bytes >= kPage ? kPage : kLine);
  const std::lock_guard<std::mutex> lock(mutex_);
  std::size_t begin = 0;
  for (const auto& [used, length] : used_) {
    const std::size_t aligned = bytes >= kPage ? up(begin, kPage) : begin;
    if (used >= aligned && used - aligned >= size) break;
    begin = used + length;
  }
  if (bytes >= kPage) begin = up(begin, kPage);
  if (begin > room || size > room - begin) return nullptr;
  const std::size_t end = up(begin + size, kPage);
  if (end > backed_) {
    if (!segment_.reserve(backed_, end - backed_)) {
      segment_.give_back(backed_, end - backed_);
      return nullptr;
    }
    backed_ = end;
  }
  used_.emplace(begin, size);
  return segment_.arena(segment_.rank()) + begin;
}

bool Arena::release(void* memory) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = used_.find(static_cast<char*>(memory) - segment_.arena(segment_.rank()));
  if (found == used_.end()) return false;
  used_.erase(found);
  const std::size_t top = used_.empty() ? 0 : up(used_.rbegin()->first + used_.rbegin()->second, kPage);
  if (backed_ > top + kKept) {
    segment_.give_back(top + kKept, backed_ - top - kKept);
    backed_ = top + kKept;
  }
  return true;
}

}  // namespace shoal
