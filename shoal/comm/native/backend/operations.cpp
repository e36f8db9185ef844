// Torch's collectives in terms of ShmGroup's and BetweenHosts': those that all ranks end with the same.
#include "arguments.hpp"

namespace shoal {

void ShoalBackend::check(const at::Tensor& tensor) const {
  if (!tensor.device().is_cpu()) throw Unusable("a tensor is on " + tensor.device().str() + "; " + kind_ + " takes tensors on cpu");
  if (tensor.layout() != at::kStrided) throw Unusable("a tensor is sparse; " + kind_ + " takes dense ones");
}

void ShoalBackend::check_root(int64_t root) const {
  if (root < 0 || root >= size_) throw Unusable("there is no rank " + std::to_string(root) + " among " + std::to_string(size_));
}

void ShoalBackend::all_reduce(Doing& doing, const at::Tensor& tensor, const c10d::ReduceOp& torch_op) {
  check(tensor);
  const Elements elements(tensor);
  const auto op = reduce_op_of(torch_op);
  if (!op || !can_reduce(elements.dtype, *op)) {
    ask_for(doing.request, tensor, elements.count);
    doing.request.reduce = op ? static_cast<std::uint8_t>(*op) : 254;
    agree(doing);
    std::vector<at::Tensor> tensors{tensor};
    c10d::AllreduceOptions options;
    options.reduceOp = torch_op;
    gloo_->allreduce(tensors, options)->wait();
    return;
  }
  const Row row(tensor);
  if (one_host()) {
    local_->all_reduce(row.data(), row.data(), elements.count, elements.dtype, *op, doing.timeout_s);
  } else {
    ask_for(doing.request, tensor, elements.count);
    doing.request.reduce = static_cast<std::uint8_t>(*op);
    between_->all_reduce(doing, row.data(), elements.count, elements.dtype, tensor.scalar_type(), *op);
  }
  row.back();
}

ShoalBackend::WorkPtr ShoalBackend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& opts) {
  const at::Tensor& tensor = only(tensors, "all_reduce");
  if (tensor.is_sparse()) return allreduce_sparse(tensors, opts);
  return call(OpType::ALLREDUCE, "shoal:all_reduce", opts.asyncOp, opts.timeout, list_of(tensors),
              [this, tensor, op = opts.reduceOp](Doing& doing) { all_reduce(doing, tensor, op); });
}

ShoalBackend::WorkPtr ShoalBackend::allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) {
  return call(OpType::ALLREDUCE_COALESCED, "shoal:all_reduce_coalesced", opts.asyncOp, opts.timeout, list_of(tensors),
              [this, tensors, op = opts.reduceOp](Doing& doing) {
                for (const auto& tensor : tensors) all_reduce(doing, tensor, op);
              });
}

ShoalBackend::WorkPtr ShoalBackend::allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& opts) {
  const at::Tensor& tensor = only(tensors, "all_reduce");
  return call(OpType::_ALLREDUCE_SPARSE, "shoal:all_reduce_sparse", opts.asyncOp, opts.timeout, list_of(tensors),
              [this, tensor, opts](Doing& doing) {
                ask_for(doing.request, tensor, tensor.numel());
                doing.request.reduce = opts.reduceOp.op_;
                agree(doing);
                std::vector<at::Tensor> sparse{tensor};
                gloo_->allreduce(sparse, opts)->wait();
              });
}

ShoalBackend::WorkPtr ShoalBackend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& opts) {
  const at::Tensor& tensor = only(tensors, "broadcast");
  return call(OpType::BROADCAST, "shoal:broadcast", opts.asyncOp, opts.timeout, list_of(tensors),
              [this, tensor, root = opts.rootRank](Doing& doing) {
                check(tensor);
                check_root(root);
                const Elements elements(tensor);
                const Row row(tensor);
                if (one_host()) {
                  local_->broadcast(row.data(), elements.count, elements.dtype, static_cast<int>(root), doing.timeout_s);
                } else {
                  ask_for(doing.request, tensor, elements.count);
                  doing.request.root = static_cast<int>(root);
                  between_->broadcast(doing, row.data(), elements.count, elements.dtype, static_cast<int>(root));
                }
                row.back();
              });
}

ShoalBackend::WorkPtr ShoalBackend::reduce(Tensors& tensors, const c10d::ReduceOptions& opts) {
  const at::Tensor& tensor = only(tensors, "reduce");
  return call(OpType::REDUCE, "shoal:reduce", opts.asyncOp, opts.timeout, list_of(tensors),
              [this, tensor, opts](Doing& doing) {
                check(tensor);
                check_root(opts.rootRank);
                const Elements elements(tensor);
                const auto op = reduce_op_of(opts.reduceOp);
                const int root = static_cast<int>(opts.rootRank);
                doing.request.root = root;
                if (!op || !can_reduce(elements.dtype, *op) || !one_host()) {
                  const at::Tensor result = rank_ == root ? tensor : tensor.clone();
                  return all_reduce(doing, result, opts.reduceOp);  // others keep what they have
                }
                const Row row(tensor);
                const at::Tensor spare = rank_ == root ? at::Tensor() : at::empty_like(row.row);
                local_->reduce(row.data(), rank_ == root ? row.data() : spare.data_ptr(), elements.count, elements.dtype,
                               *op, root, doing.timeout_s);
                row.back();
              });
}

void ShoalBackend::all_gather(Doing& doing, const at::Tensor& in, const Tensors& outs) {
  check(in);
  for (const auto& out : outs) {
    check(out);
    same_type(in, out);
  }
  if (static_cast<int>(outs.size()) != size_) throw Unusable("all_gather takes an output a rank: " + std::to_string(size_));
  same_count(in.numel(), outs[rank_].numel(), "all_gather's input");
  const Elements elements(in);
  const Row row(in);
  const auto rows = rows_of(outs, false);
  const auto places = places_of(rows);
  const auto counts = counts_of(outs);
  if (one_host()) {
    local_->all_gather(row.data(), places.data(), counts.data(), elements.dtype, doing.timeout_s);
  } else {
    ask_for(doing.request, in, std::accumulate(counts.begin(), counts.end(), std::size_t{0}));
    doing.request.shape = digest_of(counts);
    between_->all_gather(doing, row.data(), places, counts, elements.dtype);
  }
  back(rows);
}

void ShoalBackend::all_gather(Doing& doing, const at::Tensor& in, const at::Tensor& out) {
  check(in);
  check(out);
  same_type(in, out);
  same_count(out.numel(), in.numel() * size_, "all_gather's output");
  const Elements elements(in);
  const Row row(in), all(out, false);
  if (one_host()) {
    local_->all_gather(row.data(), all.data(), elements.count, elements.dtype, doing.timeout_s);
  } else {
    ask_for(doing.request, in, elements.count * size_);
    std::vector<void*> places;
    for (int r = 0; r < size_; ++r) places.push_back(static_cast<char*>(all.data()) + r * in.nbytes());
    const std::vector<std::size_t> counts(size_, elements.count);
    between_->all_gather(doing, row.data(), places, counts, elements.dtype);
  }
  all.back();
}

ShoalBackend::WorkPtr ShoalBackend::allgather(Lists& outs, Tensors& ins, const c10d::AllgatherOptions& opts) {
  const at::Tensor& in = only(ins, "all_gather");
  TORCH_CHECK_VALUE(outs.size() == 1, "all_gather takes one list of outputs, got ", outs.size());
  return call(OpType::ALLGATHER, "shoal:all_gather", opts.asyncOp, opts.timeout, lists_of(outs),
              [this, in, outs = outs[0]](Doing& doing) { all_gather(doing, in, outs); });
}

ShoalBackend::WorkPtr ShoalBackend::_allgather_base(at::Tensor& out, at::Tensor& in,
                                                    const c10d::AllgatherOptions& opts) {
  return call(OpType::_ALLGATHER_BASE, "shoal:all_gather", opts.asyncOp, opts.timeout, list_of({out}),
              [this, in, out](Doing& doing) { all_gather(doing, in, out); });
}

ShoalBackend::WorkPtr ShoalBackend::allgather_coalesced(Lists& outs, Tensors& ins, const c10d::AllgatherOptions& opts) {
  return call(OpType::ALLGATHER_COALESCED, "shoal:all_gather_coalesced", opts.asyncOp, opts.timeout, lists_of(outs),
              [this, ins, outs](Doing& doing) {  // outs[rank][i] takes ins[i] of that rank
                for (std::size_t i = 0; i < ins.size(); ++i) {
                  Tensors of_all;
                  for (const auto& of_rank : outs) {
                    if (of_rank.size() != ins.size()) throw Unusable("all_gather_coalesced: lists of unequal lengths");
                    of_all.push_back(of_rank[i]);
                  }
                  all_gather(doing, ins[i], of_all);
                }
              });
}

ShoalBackend::WorkPtr ShoalBackend::allgather_into_tensor_coalesced(Tensors& outs, Tensors& ins,
                                                                    const c10d::AllgatherOptions& opts) {
  TORCH_CHECK_VALUE(outs.size() == ins.size(), "as many outputs as inputs are needed");
  return call(OpType::COALESCED, "shoal:all_gather_coalesced", opts.asyncOp, opts.timeout, list_of(outs),
              [this, ins, outs](Doing& doing) {
                for (std::size_t i = 0; i < ins.size(); ++i) all_gather(doing, ins[i], outs[i]);
              });
}

void ShoalBackend::reduce_scatter(Doing& doing, const Tensors& ins, const at::Tensor& out,
                                  const c10d::ReduceOp& torch_op) {
  check(out);
  for (const auto& in : ins) {
    check(in);
    same_type(in, out);
  }
  if (static_cast<int>(ins.size()) != size_) throw Unusable("reduce_scatter takes an input a rank: " + std::to_string(size_));
  same_count(out.numel(), ins[rank_].numel(), "reduce_scatter's output");
  const Elements elements(out);
  const auto op = reduce_op_of(torch_op);
  const auto counts = counts_of(ins);
  if (!op || !can_reduce(elements.dtype, *op) || !one_host()) {
    ask_for(doing.request, out, std::accumulate(counts.begin(), counts.end(), std::size_t{0}));
    doing.request.shape = digest_of(counts);
    doing.request.reduce = op ? static_cast<std::uint8_t>(*op) : 254;
  }
  if (!op || !can_reduce(elements.dtype, *op)) {
    agree(doing);
    std::vector<at::Tensor> outs{out};
    std::vector<std::vector<at::Tensor>> lists{ins};
    c10d::ReduceScatterOptions options;
    options.reduceOp = torch_op;
    gloo_->reduce_scatter(outs, lists, options)->wait();
    return;
  }
  const auto rows = rows_of(ins, true);
  const auto places = places_of(rows);
  const Row mine(out, false);
  if (one_host()) {
    local_->reduce_scatter(places.data(), mine.data(), counts.data(), elements.dtype, *op, doing.timeout_s);
  } else {
    between_->reduce_scatter(doing, places, mine.data(), counts, elements.dtype, out.scalar_type(), *op);
  }
  mine.back();
}

void ShoalBackend::reduce_scatter(Doing& doing, const at::Tensor& in, const at::Tensor& out,
                                  const c10d::ReduceOp& torch_op) {
  check(in);
  check(out);
  same_type(in, out);
  same_count(in.numel(), out.numel() * size_, "reduce_scatter's input");
  const Elements elements(out);
  const auto op = reduce_op_of(torch_op);
  const Row all(in);
  if (op && can_reduce(elements.dtype, *op) && one_host()) {
    const Row mine(out, false);
    local_->reduce_scatter(all.data(), mine.data(), elements.count, elements.dtype, *op, doing.timeout_s);
    mine.back();
    return;
  }
  const at::Tensor flat = all.row.view({-1});
  Tensors parts;
  for (int r = 0; r < size_; ++r) parts.push_back(flat.narrow(0, r * out.numel(), out.numel()));
  reduce_scatter(doing, parts, out.is_contiguous() ? out.view({-1}) : out, torch_op);
}

ShoalBackend::WorkPtr ShoalBackend::reduce_scatter(Tensors& outs, Lists& ins, const c10d::ReduceScatterOptions& opts) {
  const at::Tensor& out = only(outs, "reduce_scatter");
  TORCH_CHECK_VALUE(ins.size() == 1, "reduce_scatter takes one list of inputs, got ", ins.size());
  return call(OpType::REDUCE_SCATTER, "shoal:reduce_scatter", opts.asyncOp, opts.timeout, list_of(outs),
              [this, out, ins = ins[0], op = opts.reduceOp](Doing& doing) { reduce_scatter(doing, ins, out, op); });
}

ShoalBackend::WorkPtr ShoalBackend::_reduce_scatter_base(at::Tensor& out, at::Tensor& in,
                                                         const c10d::ReduceScatterOptions& opts) {
  return call(OpType::_REDUCE_SCATTER_BASE, "shoal:reduce_scatter", opts.asyncOp, opts.timeout, list_of({out}),
              [this, out, in, op = opts.reduceOp](Doing& doing) { reduce_scatter(doing, in, out, op); });
}

ShoalBackend::WorkPtr ShoalBackend::reduce_scatter_tensor_coalesced(Tensors& outs, Tensors& ins,
                                                                    const c10d::ReduceScatterOptions& opts) {
  TORCH_CHECK_VALUE(outs.size() == ins.size(), "as many outputs as inputs are needed");
  return call(OpType::REDUCE_SCATTER_TENSOR_COALESCED, "shoal:reduce_scatter_coalesced", opts.asyncOp, opts.timeout,
              list_of(outs), [this, ins, outs, op = opts.reduceOp](Doing& doing) {
                for (std::size_t i = 0; i < ins.size(); ++i) reduce_scatter(doing, ins[i], outs[i], op);
              });
}

}  // namespace shoal
