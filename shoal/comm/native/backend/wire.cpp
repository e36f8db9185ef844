#include "wire.hpp"

#include <pthread.h>
#include <unistd.h>

#include <ATen/ATen.h>

namespace shoal {
namespace {

constexpr auto kLook = std::chrono::milliseconds(50);
constexpr int kLooksUntilDormant = 20;

at::Tensor memory_at(const void* data, std::size_t bytes) {
  return at::from_blob(const_cast<void*>(data), {static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte));
}

}  // namespace

std::string Wire::cause_of(const std::string& what) {
  std::string cause = what.substr(0, what.find('\n'));
  const std::size_t place = cause.find("] ");  // gloo says in which of its files it noticed
  if (cause.rfind('[', 0) == 0 && place != std::string::npos) cause = cause.substr(place + 2);
  return cause.substr(0, cause.find(". "));
}

Wire::Wire(c10::intrusive_ptr<c10d::Backend> gloo, std::function<bool()> given_up)
    : gloo_(std::move(gloo)), given_up_(std::move(given_up)), owner_(getpid()) {}

Wire::~Wire() {
  if (owner_ != getpid() || !watcher_) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    changed_.notify_all();
  }
  watcher_->join();
  delete watcher_;
}

Wire::Message Wire::send(int to, std::vector<at::Tensor>& memory, int tag) {
  if (!gloo_) throw std::runtime_error("this rank has given up the group");
  return gloo_->send(memory, to, tag);
}

Wire::Message Wire::receive(int from, std::vector<at::Tensor>& memory, int tag) {
  if (!gloo_) throw std::runtime_error("this rank has given up the group");
  return gloo_->recv(memory, from, tag);
}

void Wire::wait(const Message& message, double timeout_s) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (interrupted_) throw std::runtime_error("this rank has given up the group");
    waited_for_ = message;
    if (!watcher_) watcher_ = new std::thread([this] { watch(); });
    if (dormant_) changed_.notify_all();
  }
  bool done = false;
  std::string cause;
  try {
    done = message->wait(std::chrono::milliseconds(static_cast<int64_t>(timeout_s * 1e3) + 1));
  } catch (const std::exception& error) {
    cause = cause_of(error.what());
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  waited_for_.reset();
  if (interrupted_) cause = "this host has given up the group";
  if (!done) throw std::runtime_error(cause.empty() ? "interrupted" : cause);
}

void Wire::interrupt() {
  const std::lock_guard<std::mutex> lock(mutex_);
  interrupted_ = true;
  if (waited_for_) waited_for_->abort();
}

void Wire::leave() { gloo_.reset(); }

void Wire::watch() {
  pthread_setname_np(pthread_self(), "shoal-wire");
  std::unique_lock<std::mutex> lock(mutex_);
  int idle = 0;
  while (!closing_) {
    changed_.wait_for(lock, kLook);
    if (!waited_for_ && ++idle > kLooksUntilDormant) {
      dormant_ = true;
      changed_.wait(lock, [this] { return closing_ || waited_for_; });
      dormant_ = false;
    }
    if (!waited_for_) continue;
    idle = 0;
    if (!interrupted_ && given_up_()) {
      interrupted_ = true;
      waited_for_->abort();
    }
  }
}

void Exchange::send(int to, const void* data, std::size_t bytes, int tag) {
  if (!bytes) return;
  Message message{to, {memory_at(data, bytes)}, nullptr};
  try {
    message.work = wire_.send(to, message.memory, tag);
  } catch (const std::exception& error) {
    throw Lost(to, false, Wire::cause_of(error.what()));
  }
  messages_.push_back(std::move(message));
}

void Exchange::receive(int from, void* data, std::size_t bytes, int tag) {
  if (!bytes) return;
  Message message{from, {memory_at(data, bytes)}, nullptr};
  try {
    message.work = wire_.receive(from, message.memory, tag);
  } catch (const std::exception& error) {
    throw Lost(from, false, Wire::cause_of(error.what()));
  }
  messages_.push_back(std::move(message));
}

void Exchange::wait(double timeout_s) {
  for (const auto& message : messages_) {
    try {
      wire_.wait(message.work, timeout_s);
    } catch (const std::exception& error) {
      throw Lost(message.rank, std::string(error.what()).find("imed out") != std::string::npos, error.what());
    }
  }
  messages_.clear();
}

}  // namespace shoal
