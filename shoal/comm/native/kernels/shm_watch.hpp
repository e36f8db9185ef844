// Learning at once that another process has died.
#pragma once

#include <functional>
#include <thread>
#include <vector>

namespace shoal {

// A thread that sleeps in poll(2) on the processes' descriptors (pidfd: unlike kill(pid, 0) it tells a zombie from a
// living process) and calls `died(rank)` for each that ends. No processes, no thread.
class Watch {
 public:
  Watch(const std::vector<int>& pidfds, std::function<void(int)> died);
  void stop(bool in_child_of_fork);  // before destruction; a forked child has no such thread to join
  ~Watch() = default;

 private:
  void run(std::function<void(int)> died);
  std::vector<int> pidfds_;  // own duplicates, by rank; -1: none
  int stop_ = -1;            // eventfd
  std::thread* thread_ = nullptr;
};

}  // namespace shoal
