// Who carries out a group's collectives, and in which order; and who runs what users hang on their completion.
#pragma once

#include <torch/csrc/distributed/c10d/Work.hpp>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace shoal {

class CallQueue;

// A call's tensors, as its future gives them back: a list, or a list of lists.
struct Results {
  std::vector<at::Tensor> list;
  std::vector<std::vector<at::Tensor>> lists;
  bool nested = false;
  c10::IValue value() const;
};

class CallWork : public c10d::Work {
 public:
  CallWork(int rank, c10d::OpType type, const char* title, Results results, std::uint64_t sequence);

  std::vector<at::Tensor> result() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  bool wait(std::chrono::milliseconds timeout) override;  // carries the call out itself where nobody has begun it
  std::uint64_t getSequencenumber() const override { return sequence_; }
  void done(std::exception_ptr failure);

 private:
  friend class CallQueue;
  Results results_;
  std::uint64_t sequence_;
  std::function<void()> act_;         // until it has run
  std::shared_ptr<CallQueue> queue_;  // set once, before anybody else sees this
  bool ran_ = false;                  // guarded by the queue's mutex
  c10::intrusive_ptr<c10::ivalue::Future> future_;  // made when it is asked for
};

// One call at a time, first come, first served. A synchronous call runs on its caller's thread when nothing is before
// it; all others on one thread, or on that of a caller who waits: it would only sleep otherwise.
class CallQueue : public std::enable_shared_from_this<CallQueue> {
 public:
  CallQueue();
  ~CallQueue();

  // Runs `act` here and now if nothing is before it; false where it did not.
  template <typename Act>
  bool run_here(Act&& act) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (running_ || !calls_.empty()) return false;
      running_ = true;
    }
    const Turn turn{*this};
    act();
    return true;
  }
  void post(const c10::intrusive_ptr<CallWork>& work, std::function<void()> act);
  void wait_for(CallWork& work);
  void close();  // all that was posted has run; the thread has gone

 private:
  struct Turn {
    CallQueue& queue;
    ~Turn() { queue.end_turn(); }
  };
  void end_turn();
  void run_front(std::unique_lock<std::mutex>& lock);
  void serve();

  std::mutex mutex_;
  std::condition_variable ready_;  // for the thread: there is something to run
  std::condition_variable ran_;    // for those who wait
  std::deque<c10::intrusive_ptr<CallWork>> calls_;
  std::thread* thread_ = nullptr;  // from the first call that was posted
  int waiting_ = 0;
  bool running_ = false, closing_ = false;
  const int owner_;  // process; a forked child has no such thread
};

// Runs `task` soon, on a thread that may block in it as long as it likes: the next task gets another one. Users'
// callbacks wait for further collectives (PowerSGD does), so they never run on a thread that carries those out.
void run_aside(std::function<void()> task);

}  // namespace shoal
