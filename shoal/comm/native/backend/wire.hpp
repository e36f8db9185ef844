// The connections of one rank to those of other hosts, as gloo makes them, and a way to stop waiting for them.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace shoal {

// What a caller does is not known to a rank that waits for another host's data. While it waits, somebody looks whether
// its own host has given up; and when it gives up itself it closes its connections, which the other hosts notice as if
// it had died. So a failure travels through all hosts by itself.
class Wire {
 public:
  using Message = c10::intrusive_ptr<c10d::Work>;
  Wire(c10::intrusive_ptr<c10d::Backend> gloo, std::function<bool()> given_up);
  ~Wire();

  Message send(int to, std::vector<at::Tensor>& memory, int tag);
  Message receive(int from, std::vector<at::Tensor>& memory, int tag);
  void wait(const Message&, double timeout_s);  // raises std::runtime_error with a cause in a few words
  void interrupt();                             // whoever waits, stops; by any thread
  static std::string cause_of(const std::string& what);
  void leave();                                 // by the thread that sends and receives; closes the connections

 private:
  void watch();
  c10::intrusive_ptr<c10d::Backend> gloo_;  // null: left
  const std::function<bool()> given_up_;
  std::mutex mutex_;
  std::condition_variable changed_;
  Message waited_for_;
  bool dormant_ = false, closing_ = false, interrupted_ = false;
  std::thread* watcher_ = nullptr;  // from the first wait
  const int owner_;
};

// Messages under way to and from ranks of other hosts.
class Exchange {
 public:
  explicit Exchange(Wire& wire) : wire_(wire) {}
  void send(int to, const void* data, std::size_t bytes, int tag);
  void receive(int from, void* data, std::size_t bytes, int tag);
  void wait(double timeout_s);  // raises Lost, naming the rank

  struct Lost : std::runtime_error {
    Lost(int rank_, bool late_, const std::string& cause) : std::runtime_error(cause), rank(rank_), late(late_) {}
    int rank;
    bool late;
  };

 private:
  struct Message {
    int rank;
    std::vector<at::Tensor> memory;
    Wire::Message work;
  };
  Wire& wire_;
  std::vector<Message> messages_;
};

}  // namespace shoal
