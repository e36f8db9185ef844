// The C functions that shoal/serve/generation/native_step.py calls.
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "step.hpp"

#define SHOAL_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
using namespace generation;

// A team of threads that are woken for a step and meet between its parts. Waiting sleeps: a core that spins at a meeting
// is taken from those who work when cores are shared.
class Team {
 public:
  explicit Team(std::int64_t count) : count_(count) {
    for (std::int64_t i = 1; i < count; ++i) threads_.emplace_back([this, i] { follow(i); });
  }
  ~Team() {
    {
      const std::lock_guard<std::mutex> hold(lock_);
      ended_ = true;
    }
    changed_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  void run(Step step, const Shape& shape, const void* const* weights, const Batch& batch) {
    step_ = step, shape_ = &shape, weights_ = weights, batch_ = &batch;
    if (count_ > 1) {
      {
        const std::lock_guard<std::mutex> hold(lock_);
        ++turn_;
      }
      changed_.notify_all();
    }
    work(0);
    meet();
  }

 private:
  void work(std::int64_t index) {
    step_(*shape_, weights_, *batch_, {index, count_, [](void* team) { static_cast<Team*>(team)->meet(); }, this});
  }
  void follow(std::int64_t index) {
    for (std::int64_t seen = 0;; ++seen) {
      {
        std::unique_lock<std::mutex> hold(lock_);
        changed_.wait(hold, [&] { return ended_ || turn_ > seen; });
        if (ended_) return;
      }
      work(index);
      meet();
    }
  }
  void meet() {
    if (count_ == 1) return;
    std::unique_lock<std::mutex> hold(meeting_);
    const std::int64_t mine = meetings_;
    if (++here_ == count_) {
      here_ = 0;
      ++meetings_;
      hold.unlock();
      met_.notify_all();
      return;
    }
    met_.wait(hold, [&] { return meetings_ != mine; });
  }

  const std::int64_t count_;
  std::vector<std::thread> threads_;
  std::mutex lock_, meeting_;
  std::condition_variable changed_, met_;
  std::int64_t turn_ = 0, meetings_ = 0, here_ = 0;
  bool ended_ = false;
  Step step_ = nullptr;
  const Shape* shape_ = nullptr;
  const void* const* weights_ = nullptr;
  const Batch* batch_ = nullptr;
};

Step chosen(std::int64_t which) {  // 0 the widest that this processor has, 1 plain, 2 AVX2, 3 AVX-512
#if defined(__x86_64__)
  const bool wide = __builtin_cpu_supports("avx512f"), middle = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if ((which == 0 || which == 3) && wide && avx512_step()) return avx512_step();
  if ((which == 0 || which == 2) && middle && avx2_step()) return avx2_step();
#endif
  return which <= 1 ? plain_step() : nullptr;
}
}  // namespace

SHOAL_EXPORT void* generation_team(std::int64_t threads) { return new Team(threads); }
SHOAL_EXPORT void generation_disband(void* team) { delete static_cast<Team*>(team); }
SHOAL_EXPORT std::int64_t generation_has(std::int64_t which) { return chosen(which) != nullptr; }

SHOAL_EXPORT void generation_step(void* team, std::int64_t which, const Shape* shape, const void* const* weights,
                                  const Batch* batch) {
  static_cast<Team*>(team)->run(chosen(which), *shape, weights, *batch);
}

// Block `from` of every layer onto block `to`; cache [layers, blocks, block_floats].
SHOAL_EXPORT void generation_copy(float* cache, std::int64_t layers, std::int64_t blocks, std::int64_t block_floats,
                                  std::int64_t from, std::int64_t to) {
  for (std::int64_t l = 0; l < layers; ++l, cache += blocks * block_floats)
    std::memcpy(cache + to * block_floats, cache + from * block_floats, block_floats * sizeof(float));
}
