#include "queue.hpp"

#include <pthread.h>
#include <unistd.h>

#include <ATen/record_function.h>

namespace shoal {
namespace {

constexpr auto kIdle = std::chrono::seconds(5);

// Lives as long as the process: threads that sleep in a user's callback cannot be joined.
class Aside {
 public:
  void run(std::function<void()> task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back(std::move(task));
    if (static_cast<std::size_t>(idle_) >= tasks_.size()) {
      ready_.notify_one();
    } else {
      std::thread([this] { serve(); }).detach();
    }
  }

 private:
  void serve() {
    pthread_setname_np(pthread_self(), "shoal-aside");
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      ++idle_;
      const bool found = ready_.wait_for(lock, kIdle, [this] { return !tasks_.empty(); });
      --idle_;
      if (!found) return;
      auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      task = nullptr;  // what it holds may take a while to go
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> tasks_;
  int idle_ = 0;
};

}  // namespace

void run_aside(std::function<void()> task) {
  static std::mutex mutex;
  static Aside* aside = nullptr;
  static int owner = 0;
  Aside* mine;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (owner != getpid()) {  // a forked child has none of its parent's threads
      aside = new Aside;
      owner = getpid();
    }
    mine = aside;
  }
  mine->run(std::move(task));
}

c10::IValue Results::value() const { return nested ? c10::IValue(lists) : c10::IValue(list); }

CallWork::CallWork(int rank, c10d::OpType type, const char* title, Results results, std::uint64_t sequence)
    : Work(rank, type, at::hasCallbacks() ? title : nullptr, at::hasCallbacks() && !results.list.empty()
               ? std::optional<std::vector<at::Tensor>>(results.list) : std::nullopt),
      results_(std::move(results)),
      sequence_(sequence) {}

std::vector<at::Tensor> CallWork::result() {
  std::vector<at::Tensor> all = results_.list;
  for (const auto& list : results_.lists) all.insert(all.end(), list.begin(), list.end());
  return all;
}

c10::intrusive_ptr<c10::ivalue::Future> CallWork::getFuture() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!future_) {
    const c10::TypePtr list = c10::ListType::create(c10::TensorType::get());
    future_ = c10::make_intrusive<c10::ivalue::Future>(results_.nested ? c10::ListType::create(list) : list);
    if (completed_) {  // nothing can hang on it yet
      if (exception_) {
        future_->setError(exception_);
      } else {
        future_->markCompleted(results_.value());
      }
    }
  }
  return future_;
}

void CallWork::done(std::exception_ptr failure) {
  c10::intrusive_ptr<c10::ivalue::Future> future;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    completed_ = true;
    exception_ = failure;
    future = future_;
    if (recordFunctionEndCallback_) {
      recordFunctionEndCallback_();
      recordFunctionEndCallback_ = nullptr;
    }
  }
  cv_.notify_all();
  if (!future) return;
  run_aside([future = std::move(future), failure, value = failure ? c10::IValue() : results_.value()] {
    if (failure) {
      future->setError(failure);
    } else {
      future->markCompleted(value);
    }
  });
}

bool CallWork::wait(std::chrono::milliseconds timeout) {
  if (timeout == kNoTimeout && queue_) queue_->wait_for(*this);
  const bool finished = Work::wait(timeout);  // raises what the call raised
  c10::intrusive_ptr<c10::ivalue::Future> future;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    future = future_;
  }
  if (future) future->wait();  // about to be complete: who has waited for the one may ask the other
  return finished;
}

CallQueue::CallQueue() : owner_(getpid()) {}

CallQueue::~CallQueue() { close(); }

void CallQueue::post(const c10::intrusive_ptr<CallWork>& work, std::function<void()> act) {
  work->act_ = std::move(act);
  work->queue_ = shared_from_this();
  const std::lock_guard<std::mutex> lock(mutex_);
  TORCH_CHECK(!closing_, "the group has been shut down");
  if (!thread_) thread_ = new std::thread([this] { serve(); });
  calls_.push_back(work);
  if (!running_) ready_.notify_one();
}

void CallQueue::run_front(std::unique_lock<std::mutex>& lock) {
  auto work = std::move(calls_.front());
  calls_.pop_front();
  running_ = true;
  lock.unlock();
  std::exception_ptr failure;
  try {
    work->act_();
  } catch (...) {
    failure = std::current_exception();
  }
  work->act_ = nullptr;
  work->done(failure);
  lock.lock();
  work->ran_ = true;
  running_ = false;
  if (waiting_) ran_.notify_all();
  if (!calls_.empty()) ready_.notify_one();
  lock.unlock();
  work.reset();  // may be the last to hold tensors
  lock.lock();
}

void CallQueue::end_turn() {
  const std::lock_guard<std::mutex> lock(mutex_);
  running_ = false;
  if (calls_.empty() && !waiting_) return;
  ready_.notify_one();
  ran_.notify_all();
}

void CallQueue::wait_for(CallWork& work) {
  std::unique_lock<std::mutex> lock(mutex_);
  ++waiting_;
  while (!work.ran_) {
    if (!running_ && !calls_.empty()) {
      run_front(lock);
    } else {
      ran_.wait(lock);
    }
  }
  --waiting_;
}

void CallQueue::serve() {
  pthread_setname_np(pthread_self(), "shoal-comm");
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    ready_.wait(lock, [this] { return !running_ && (closing_ || !calls_.empty()); });
    if (calls_.empty()) return;
    run_front(lock);
  }
}

void CallQueue::close() {
  if (owner_ != getpid()) return;
  std::thread* thread;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    thread = thread_;
    thread_ = nullptr;
    ready_.notify_all();
  }
  if (!thread) return;
  if (thread->get_id() == std::this_thread::get_id()) {
    thread->detach();  // the last to let go of the group was a callback of its own call
  } else {
    thread->join();
  }
  delete thread;
}

}  // namespace shoal
