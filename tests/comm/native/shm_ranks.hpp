// Ranks as threads of one process over one memory file, and claims that end the program when they are false.
#pragma once

#include <sys/mman.h>
#include <sys/syscall.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "shm_group.hpp"

#define CLAIM(condition, ...)                                             \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::fprintf(stderr, "%s:%d: not so: %s. ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                  \
      std::fprintf(stderr, "\n");                                         \
      std::_Exit(1);                                                      \
    }                                                                     \
  } while (0)

// One mapping for all ranks: a sanitizer sees that they touch the same bytes only at the same addresses.
class Shared {
 public:
  Shared(int world, shoal::Options options) : options_(options) {
    memfd_ = static_cast<int>(syscall(SYS_memfd_create, "shoal-test", 1u));
    bytes_ = shoal::ShmGroup::total_bytes(world, options);
    CLAIM(memfd_ >= 0 && ftruncate(memfd_, static_cast<off_t>(bytes_)) == 0, "no memory file");
    const auto reserved = static_cast<off_t>(shoal::ShmGroup::reserved_bytes(world, options));
    CLAIM(fallocate(memfd_, 0, 0, reserved) == 0, "no memory");
    options_.mapping = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memfd_, 0);
    CLAIM(options_.mapping != MAP_FAILED, "no mapping");
  }
  ~Shared() {
    munmap(options_.mapping, bytes_);
    close(memfd_);
  }
  int memfd() const { return memfd_; }
  const shoal::Options& options() const { return options_; }

 private:
  int memfd_;
  std::size_t bytes_;
  shoal::Options options_;
};

inline shoal::Options small_options() {
  shoal::Options options;
  options.name = "test";
  options.timeout_s = 60;
  options.usable_cores = 2;
  options.slot_bytes = 32 << 10;  // so that small buffers need many pieces
  options.arena_bytes = 8 << 20;
  return options;
}

inline void on_ranks(int world, const shoal::Options& options, const std::function<void(shoal::ShmGroup&, int)>& work) {
  const Shared shared(world, options);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        shoal::ShmGroup group(shared.memfd(), rank, world, {}, shared.options());
        work(group, rank);
      } catch (const std::exception& error) {
        CLAIM(false, "rank %d raised: %s", rank, error.what());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// What the call raises; anything else ends the program.
inline shoal::Failure failure_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const shoal::Failure& failure) {
    CLAIM(std::string(failure.what()).find('\n') == std::string::npos, "more than a line: %s", failure.what());
    return failure;
  }
  CLAIM(false, "nothing was raised");
  std::abort();
}

inline void claim_says(const shoal::Failure& failure, shoal::Failure::Kind kind,
                       const std::vector<std::string>& parts) {
  CLAIM(failure.kind == kind, "kind %d: %s", failure.kind, failure.what());
  for (const std::string& part : parts) {
    const bool said = std::string(failure.what()).find(part) != std::string::npos;
    CLAIM(said, "'%s' is not in: %s", part.c_str(), failure.what());
  }
}
