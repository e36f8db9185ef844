#include "shm_wait.hpp"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace shoal {
namespace {

constexpr timespec kLook{0, 100000000};  // how often a sleeper asks whether it waits for somebody

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // `yield` does nothing on most
#endif
}

static_assert(sizeof(std::atomic<std::uint32_t>) == 4 && std::atomic<std::uint32_t>::is_always_lock_free);
static_assert(sizeof(std::atomic<std::uint64_t>) == 8 && std::atomic<std::uint64_t>::is_always_lock_free);

// Not FUTEX_PRIVATE: the sleepers are other processes.
void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t seen, const timespec& limit) {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT, seen, &limit, nullptr, 0);
}
void futex_wake(std::atomic<std::uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void ring(Bell& bell) {
  bell.rings.fetch_add(1, std::memory_order_seq_cst);
  futex_wake(bell.rings);
}

}  // namespace

std::chrono::nanoseconds spin_for(int world, int usable_cores) {
  // 5, 20 and 50 us were alike on quiet cores; a spin in vain, on busy ones, costs all of it twice an operation.
  return std::chrono::microseconds(world <= usable_cores ? 20 : 0);
}

void Waiter::note_core() const {
  std::atomic<std::int32_t>& noted = segment_.control(segment_.rank()).member.core;
  const int core = sched_getcpu();
  if (noted.load(std::memory_order_relaxed) != core) noted.store(core, std::memory_order_relaxed);
}

void Waiter::publish(std::uint64_t at) const {
  segment_.progress(segment_.rank(), sequence_of(at)).at.store(at, std::memory_order_seq_cst);
  wake();
}

void Waiter::wake() const {
  Header& header = segment_.header();
  for (int word = 0; word * 64 < segment_.world(); ++word) {
    std::uint64_t sleepers = header.sleepers[word].load(std::memory_order_seq_cst);
    while (sleepers) {
      const std::uint64_t bit = sleepers & (~sleepers + 1);
      sleepers ^= bit;
      const int rank = word * 64 + __builtin_ctzll(bit);
      if (rank == segment_.rank()) continue;
      Bell& bell = segment_.control(rank).bell;
      // A mixture of an old wait and a new one at worst rings for nothing: the new one looks after it has announced.
      const std::uint64_t target = bell.target.load(std::memory_order_relaxed);
      if (!reached(rank, target, bell.whom.load(std::memory_order_relaxed))) continue;
      if (header.sleepers[word].fetch_and(~bit, std::memory_order_seq_cst) & bit) shoal::ring(bell);
    }
  }
}

void Waiter::ring(int rank) const { shoal::ring(segment_.control(rank).bell); }

void Waiter::ring_all() const {
  for (int rank = 0; rank < segment_.world(); ++rank) ring(rank);
}

bool Waiter::gone(int whom) const {
  if (!asleep_ || asleep_(whom)) return false;
  segment_.control(whom).member.joined.store(2);
  return true;
}

Waiter::Outcome Waiter::wait_for(const std::function<bool()>& ready, std::atomic<std::uint32_t>& sleeps,
                                 int whom) const {
  const Clock::time_point start = Clock::now();
  const int self = segment_.rank();
  const auto core = [&](int rank) { return segment_.control(rank).member.core.load(std::memory_order_relaxed); };
  while (spin_.count() > 0 && core(whom) != core(self) && Clock::now() - start < spin_) {
    if (ready()) return Outcome::reached;
    relax();
  }
  Bell& bell = segment_.control(self).bell;
  Outcome outcome;
  for (;;) {
    const std::uint32_t seen = bell.rings.load(std::memory_order_acquire);
    sleeps.store(1, std::memory_order_seq_cst);
    const bool left = segment_.control(whom).member.joined.load(std::memory_order_seq_cst) == 2;
    outcome = Outcome::reached;
    if (ready()) break;
    outcome = Outcome::aborted;
    if (segment_.header().aborted.load(std::memory_order_seq_cst)) break;
    outcome = Outcome::left;
    if (left) break;
    if (!gone(whom)) futex_wait(bell.rings, seen, kLook);
  }
  sleeps.store(0, std::memory_order_relaxed);
  if (asleep_) asleep_(-1);
  return outcome;
}

int Waiter::missing(std::uint64_t target, int whom) const {
  const std::uint64_t sequence = sequence_of(target);
  const int first = whom < 0 ? 0 : whom, end = whom < 0 ? segment_.world() : whom + 1;
  for (int rank = first; rank < end; ++rank) {
    if (rank == segment_.rank()) continue;
    if (segment_.progress(rank, sequence).at.load(std::memory_order_acquire) < target) return rank;
  }
  return -1;
}

bool Waiter::reached(int waiting, std::uint64_t target, int whom) const {
  const std::uint64_t sequence = sequence_of(target);
  const int first = whom < 0 ? 0 : whom, end = whom < 0 ? segment_.world() : whom + 1;
  for (int rank = first; rank < end; ++rank) {
    if (rank == waiting) continue;
    if (segment_.progress(rank, sequence).at.load(std::memory_order_seq_cst) < target) return false;
  }
  return true;
}

// Whether one that is still missing has closed the group, and who: in `last`.
bool Waiter::someone_left(std::uint64_t target, int whom, int& last) const {
  const int first = whom < 0 ? 0 : whom, end = whom < 0 ? segment_.world() : whom + 1;
  for (int rank = first; rank < end; ++rank) {
    if (rank == segment_.rank() || segment_.control(rank).member.joined.load(std::memory_order_seq_cst) != 2) continue;
    if (missing(target, rank) < 0) continue;  // looked at after: it may have come, then left
    last = rank;
    return true;
  }
  return false;
}

Waiter::Outcome Waiter::wait_long(std::uint64_t target, int whom, int late, Clock::time_point deadline,
                                  std::atomic<double>* waited_s) const {
  const Clock::time_point start = Clock::now();
  const std::atomic<std::uint32_t>& aborted = segment_.header().aborted;
  int last = late, now = late;
  Outcome outcome = Outcome::reached;
  const auto look = [&] {
    last = now;
    now = missing(target, whom);
    return now >= 0 && !aborted.load(std::memory_order_acquire);
  };
  if (spin_.count() > 0) {
    // By the clock: a pause takes from 10 to 150 cycles, depending on the processor.
    note_core();
    const std::int32_t here = segment_.control(segment_.rank()).member.core.load(std::memory_order_relaxed);
    while (look() && segment_.control(now).member.core.load(std::memory_order_relaxed) != here) {
      relax();
      if (Clock::now() - start > spin_) break;
    }
  }
  if (now >= 0) outcome = sleep(target, whom, deadline, last);
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  waited_s[last].store(waited_s[last].load(std::memory_order_relaxed) + seconds, std::memory_order_relaxed);
  return outcome;
}

Waiter::Outcome Waiter::sleep(std::uint64_t target, int whom, Clock::time_point deadline, int& last) const {
  Header& header = segment_.header();
  const int self = segment_.rank();
  Bell& bell = segment_.control(self).bell;
  std::atomic<std::uint64_t>& sleepers = header.sleepers[self / 64];
  const std::uint64_t bit = std::uint64_t{1} << (self % 64);
  bell.target.store(target, std::memory_order_relaxed);
  bell.whom.store(whom, std::memory_order_relaxed);
  Outcome outcome;
  for (;;) {
    const std::uint32_t seen = bell.rings.load(std::memory_order_acquire);
    sleepers.fetch_or(bit, std::memory_order_seq_cst);
    outcome = Outcome::reached;
    if (reached(self, target, whom)) break;
    outcome = Outcome::aborted;
    if (header.aborted.load(std::memory_order_seq_cst)) break;
    last = missing(target, whom);
    if (last < 0) last = whom < 0 ? (self + 1) % segment_.world() : whom;  // came just now
    outcome = Outcome::left;
    if (someone_left(target, whom, last)) break;
    outcome = Outcome::timed_out;
    const auto rest = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - Clock::now()).count();
    if (rest <= 0) break;
    if (gone(last)) continue;
    const timespec limit{static_cast<time_t>(rest / 1000000000), static_cast<long>(rest % 1000000000)};
    futex_wait(bell.rings, seen, asleep_ && rest > kLook.tv_nsec ? kLook : limit);
  }
  sleepers.fetch_and(~bit, std::memory_order_seq_cst);
  if (asleep_) asleep_(-1);
  return outcome;
}

}  // namespace shoal
