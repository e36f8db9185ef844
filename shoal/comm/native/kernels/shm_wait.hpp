// Waiting for other ranks' progress without wasting a core, and waking those who do.
//
// A short spin (only where every rank has a core, and not for a rank that was last seen on this rank's own core, where
// it cannot run before this one lets go), then sleep on this rank's own bell (futex). No sched_yield in between: with
// the cores to itself a group of 4 ranks on 2 cores was 2-3 times as fast with it (7 against 18 us), but as soon as any
// other process wanted a core, each yield gave that one a whole slice (4000 us). A sleeper
// says what it waits for; whoever publishes progress looks whether anybody sleeps at all (one shared word, hardly ever
// written), and rings only those whose whole condition holds now: one wake-up a wait, however many ranks are awaited.
// Publish-then-look against announce-then-look must not both miss: these four accesses are sequentially consistent.
#pragma once

#include <chrono>
#include <functional>

#include "shm_segment.hpp"

namespace shoal {

using Clock = std::chrono::steady_clock;

// How long to spin with that many ranks on that many cores.
std::chrono::nanoseconds spin_for(int world, int usable_cores);

class Waiter {
 public:
  enum class Outcome { reached, timed_out, aborted, left };

  // asleep: see Options.
  Waiter(Segment& segment, std::chrono::nanoseconds spin, const std::function<bool(int)>& asleep)
      : segment_(segment), spin_(spin), asleep_(asleep) {}

  void note_core() const;  // where this rank runs
  // This rank has come to `at`.
  void publish(std::uint64_t at) const;
  // Until `whom` (-1: every other rank) has come to `target`. Fast where they have already; else adds the time to
  // waited_s[the rank that came last], or that is missing.
  Outcome wait(std::uint64_t target, int whom, Clock::time_point deadline, std::atomic<double>* waited_s) const {
    const int late = missing(target, whom);
    return late < 0 ? Outcome::reached : wait_long(target, whom, late, deadline, waited_s);
  }
  // Until `ready`, which `whom` brings about: it publishes so, then rings this rank if `sleeps` says so. No deadline.
  Outcome wait_for(const std::function<bool()>& ready, std::atomic<std::uint32_t>& sleeps, int whom) const;
  void ring(int rank) const;
  // The first rank that has not come there; -1: all have.
  int missing(std::uint64_t target, int whom) const;
  void ring_all() const;  // something happened that is no progress

 private:
  Outcome wait_long(std::uint64_t target, int whom, int late, Clock::time_point deadline,
                    std::atomic<double>* waited_s) const;
  Outcome sleep(std::uint64_t target, int whom, Clock::time_point deadline, int& last) const;
  bool someone_left(std::uint64_t target, int whom, int& last) const;
  bool reached(int waiting, std::uint64_t target, int whom) const;
  void wake() const;
  bool gone(int whom) const;  // asks `asleep`
  Segment& segment_;
  std::chrono::nanoseconds spin_;
  std::function<bool(int)> asleep_;
};

}  // namespace shoal
