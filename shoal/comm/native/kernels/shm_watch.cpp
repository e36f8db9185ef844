#include "shm_watch.hpp"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace shoal {

Watch::Watch(const std::vector<int>& pidfds, std::function<void(int)> died) {
  bool any = false;
  for (int fd : pidfds) {
    const int own = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (fd >= 0 && own < 0) {
      const std::string why = std::strerror(errno);
      stop(false);
      throw std::invalid_argument("a process descriptor of the group: " + why);
    }
    pidfds_.push_back(own);
    any = any || own >= 0;
  }
  if (!any) return;
  stop_ = eventfd(0, EFD_CLOEXEC);
  if (stop_ < 0) {
    const std::string why = std::strerror(errno);
    stop(false);
    throw std::invalid_argument("eventfd: " + why);
  }
  // Signals are for the program's own threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = new std::thread([this, died] { run(died); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Watch::run(std::function<void(int)> died) {
  std::vector<pollfd> polled;
  for (int fd : pidfds_) polled.push_back({fd, POLLIN, 0});  // poll ignores -1
  polled.push_back({stop_, POLLIN, 0});
  for (;;) {
    if (poll(polled.data(), polled.size(), -1) < 0) continue;  // only EINTR can be
    if (polled.back().revents) return;
    for (std::size_t rank = 0; rank + 1 < polled.size(); ++rank) {
      if (!polled[rank].revents) continue;
      polled[rank].fd = -1;
      died(static_cast<int>(rank));
    }
  }
}

void Watch::stop(bool in_child_of_fork) {
  if (thread_ && !in_child_of_fork) {
    const std::uint64_t one = 1;
    while (write(stop_, &one, sizeof one) < 0 && errno == EINTR) {
    }
    thread_->join();
    delete thread_;
  }
  thread_ = nullptr;
  for (int fd : pidfds_) {
    if (fd >= 0) close(fd);
  }
  pidfds_.clear();
  if (stop_ >= 0) close(stop_);
  stop_ = -1;
}

}  // namespace shoal
