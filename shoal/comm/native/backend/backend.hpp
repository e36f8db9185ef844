// torch.distributed's backends "shm" and "hier": collectives among the ranks of a host over shared memory (ShmGroup),
// among hosts by slices over gloo. What neither can do goes through gloo, once all ranks have agreed on it.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <atomic>

#include "between_hosts.hpp"
#include "queue.hpp"
#include "shm_group.hpp"
#include "words.hpp"

namespace shoal {

class ShoalBackend : public c10d::Backend {
 public:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<at::Tensor>;
  using Lists = std::vector<std::vector<at::Tensor>>;
  // Makes the backend of a part of this group: its store, this rank's place in it, its size, its options.
  using Maker = std::function<c10::intrusive_ptr<c10d::Backend>(const c10::intrusive_ptr<c10d::Store>&, int, int,
                                                                const c10::intrusive_ptr<c10d::Backend::Options>&)>;

  // gloo: for point-to-point and the rest; between: for slices, null on one host
  ShoalBackend(std::shared_ptr<ShmGroup> local, c10::intrusive_ptr<c10d::Backend> gloo,
               c10::intrusive_ptr<c10d::Backend> between, Hosts hosts, int rank, int size, std::string kind,
               std::string name, std::chrono::milliseconds timeout, Maker maker);
  ~ShoalBackend() override;

  const std::string getBackendName() const override { return kind_; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return options_; }
  void setTimeout(std::chrono::milliseconds timeout) override;
  bool supportsSplitting() const override { return true; }
  c10::intrusive_ptr<c10d::Backend> split(const c10::intrusive_ptr<c10d::Store>&, const std::vector<int>& ranks,
                                          const c10::intrusive_ptr<Options>&) override;
  void setSequenceNumberForGroup() override {}  // every group starts from 0, on all ranks
  std::uint64_t getSequenceNumberForGroup() override { return sequence_; }
  c10d::ErrorType getError() override;
  void abort() override;
  void shutdown() override;

  bool supportsTensorAlloc(c10::DeviceIndex) override { return local_->arena_room() > 0; }
  at::Tensor allocateTensor(long size, at::TensorOptions options) override;

  WorkPtr allreduce(Tensors&, const c10d::AllreduceOptions&) override;
  WorkPtr allreduce_coalesced(Tensors&, const c10d::AllreduceCoalescedOptions&) override;
  WorkPtr allreduce_sparse(Tensors&, const c10d::AllreduceOptions&) override;
  WorkPtr broadcast(Tensors&, const c10d::BroadcastOptions&) override;
  WorkPtr reduce(Tensors&, const c10d::ReduceOptions&) override;
  WorkPtr allgather(Lists&, Tensors&, const c10d::AllgatherOptions&) override;
  WorkPtr _allgather_base(at::Tensor&, at::Tensor&, const c10d::AllgatherOptions&) override;
  WorkPtr allgather_coalesced(Lists&, Tensors&, const c10d::AllgatherOptions&) override;
  WorkPtr allgather_into_tensor_coalesced(Tensors&, Tensors&, const c10d::AllgatherOptions&) override;
  WorkPtr reduce_scatter(Tensors&, Lists&, const c10d::ReduceScatterOptions&) override;
  WorkPtr _reduce_scatter_base(at::Tensor&, at::Tensor&, const c10d::ReduceScatterOptions&) override;
  WorkPtr reduce_scatter_tensor_coalesced(Tensors&, Tensors&, const c10d::ReduceScatterOptions&) override;
  WorkPtr gather(Lists&, Tensors&, const c10d::GatherOptions&) override;
  WorkPtr scatter(Tensors&, Lists&, const c10d::ScatterOptions&) override;
  WorkPtr alltoall_base(at::Tensor&, at::Tensor&, std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits, const c10d::AllToAllOptions&) override;
  WorkPtr alltoall(Tensors&, Tensors&, const c10d::AllToAllOptions&) override;
  WorkPtr barrier(const c10d::BarrierOptions&) override;
  void monitoredBarrier(const c10d::BarrierOptions&, bool wait_all_ranks) override;
  WorkPtr send(Tensors& tensors, int to, int tag) override { return gloo_->send(tensors, to, tag); }
  WorkPtr recv(Tensors& tensors, int from, int tag) override { return gloo_->recv(tensors, from, tag); }
  WorkPtr recvAnysource(Tensors& tensors, int tag) override { return gloo_->recvAnysource(tensors, tag); }

  const Hosts& hosts() const { return hosts_; }
  const std::shared_ptr<ShmGroup>& local() const { return local_; }

 private:
  using Act = std::function<void(Doing&)>;
  WorkPtr call(c10d::OpType, const char* title, bool async, std::chrono::milliseconds timeout, Results, Act);
  void explained(const Act&, Doing);
  bool one_host() const { return hosts_.ranks.size() == 1; }
  void agree(const Doing&);
  void give_up(const std::string& why);

  void all_reduce(Doing&, const at::Tensor&, const c10d::ReduceOp&);
  void all_gather(Doing&, const at::Tensor& in, const Tensors& outs);
  void all_gather(Doing&, const at::Tensor& in, const at::Tensor& out);
  void reduce_scatter(Doing&, const Tensors& ins, const at::Tensor& out, const c10d::ReduceOp&);
  void reduce_scatter(Doing&, const at::Tensor& in, const at::Tensor& out, const c10d::ReduceOp&);
  void all_to_all(Doing&, const Tensors& ins, const Tensors& outs);
  void check_root(int64_t root) const;
  void check(const at::Tensor&) const;

  std::shared_ptr<ShmGroup> local_;
  c10::intrusive_ptr<c10d::Backend> gloo_;
  Hosts hosts_;
  std::unique_ptr<BetweenHosts> between_;
  std::string kind_, name_;
  c10::intrusive_ptr<Options> options_;
  Maker maker_;
  std::shared_ptr<CallQueue> queue_ = std::make_shared<CallQueue>();
  std::atomic<std::uint64_t> sequence_{0};
};

}  // namespace shoal
