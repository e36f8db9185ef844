// Torch's memory for processors, taken from a shared mapping while the calling thread says so: what a backward pass makes
// there, other workers can read where it lies. And the count of what torch holds, of either kind.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {
constexpr std::size_t kPage = 4096;
constexpr std::size_t kSmallest = 16 * kPage;  // less is not worth a page of its own

thread_local bool inside = false;

// Bytes that torch has taken and not given back since the count began, and the most of them at once.
class Count {
 public:
  std::atomic<bool> on{false};

  void take(void* memory, std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    sizes_[memory] = bytes;
    live_ += static_cast<std::int64_t>(bytes);
    peak_ = std::max(peak_, live_);
  }
  void give_back(void* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sizes_.find(memory);
    if (found == sizes_.end()) return;  // taken before the count began
    live_ -= static_cast<std::int64_t>(found->second);
    sizes_.erase(found);
  }
  std::int64_t live() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return live_;
  }
  std::int64_t peak(bool restart) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto most = peak_;
    if (restart) peak_ = live_;
    return most;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<void*, std::size_t> sizes_;
  std::int64_t live_ = 0, peak_ = 0;
};

Count counted;

class Arena final : public c10::Allocator {
 public:
  Arena(char* base, std::size_t size, c10::Allocator* other) : base_(base), size_(size), other_(other) {}

  c10::DataPtr allocate(std::size_t bytes) override {
    if (inside && bytes >= kSmallest && size_)
      if (void* found = take((bytes + kPage - 1) / kPage * kPage)) return counted_as(found, bytes);
    c10::DataPtr made = other_->allocate(bytes);
    void* found = made.get();
    if (!counted.on || !found || made.get_context() != found) return made;
    made.release_context();
    return counted_as(found, bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void lie_on(char* base, std::size_t size) { base_ = base, size_ = size; }
  std::size_t size() const { return size_; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void release(void* memory);

  static c10::DataPtr counted_as(void* memory, std::size_t bytes) {
    if (counted.on) counted.take(memory, bytes);
    return {memory, memory, &release, c10::Device(c10::DeviceType::CPU)};
  }

  bool owns(const void* memory) const { return memory >= base_ && memory < base_ + size_; }

  void* take(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto best = by_size_.lower_bound({bytes, 0});
    std::size_t start = 0;
    if (best != by_size_.end()) {
      const auto [size, found] = *best;
      start = found;
      by_size_.erase(best);
      free_.erase(start);
      if (size > bytes) give(start + bytes, size - bytes);
    } else {
      if (bytes > size_ - end_) return nullptr;
      start = end_;
      end_ += bytes;
    }
    taken_[start] = bytes;
    return base_ + start;
  }

  void give(std::size_t start, std::size_t size) {
    free_[start] = size;
    by_size_.insert({size, start});
  }

  void put_back(void* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::size_t start = static_cast<char*>(memory) - base_;
    const auto mine = taken_.find(start);
    if (mine == taken_.end()) return;
    std::size_t size = mine->second;
    taken_.erase(mine);
    auto next = free_.lower_bound(start);
    if (next != free_.end() && next->first == start + size) {
      size += next->second;
      by_size_.erase({next->second, next->first});
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == start) {
        start = before->first;
        size += before->second;
        by_size_.erase({before->second, before->first});
        free_.erase(before);
      }
    }
    give(start, size);
  }

  char* base_;
  std::size_t size_, end_ = 0;
  c10::Allocator* other_;
  std::mutex mutex_;
  std::map<std::size_t, std::size_t> free_, taken_;           // start -> bytes
  std::set<std::pair<std::size_t, std::size_t>> by_size_;  // (bytes, start) of what is free
};

Arena* arena = nullptr;

void install(char* base, std::size_t size) {
  arena = new Arena(base, size, c10::GetCPUAllocator());
  c10::SetCPUAllocator(arena, 1);
}

void Arena::release(void* memory) {
  if (counted.on) counted.give_back(memory);
  if (arena->owns(memory)) {
    arena->put_back(memory);
  } else if (const auto deleter = arena->other_->raw_deleter()) {
    deleter(memory);
  }
}
}  // namespace

#define SHOAL_EXPORT extern "C" __attribute__((visibility("default")))

// From now on this process takes memory from base .. base + size while a thread is inside. Once a process.
SHOAL_EXPORT int shoal_arena_install(void* base, std::size_t size) {
  if (arena && arena->size()) return 0;
  if (arena)
    arena->lie_on(static_cast<char*>(base), size);
  else
    install(static_cast<char*>(base), size);
  return 1;
}

// Whether the calling thread takes memory from the arena.
SHOAL_EXPORT void shoal_arena_inside(int yes) { inside = yes != 0; }

// From now on what torch takes is counted; what it took before never is.
SHOAL_EXPORT void shoal_memory_count() {
  if (!arena) install(nullptr, 0);
  counted.on = true;
}

SHOAL_EXPORT std::int64_t shoal_memory_live() { return counted.live(); }

// The most bytes at once since the last restart.
SHOAL_EXPORT std::int64_t shoal_memory_peak(int restart) { return counted.peak(restart != 0); }
