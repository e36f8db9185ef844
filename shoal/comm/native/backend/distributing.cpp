// Torch's collectives in terms of ShmGroup's and BetweenHosts': those that give each rank its own; and the barriers.
#include "arguments.hpp"

namespace shoal {
namespace {

// dim 0 of a tensor cut into one part a rank; no sizes: even parts
Tensors parts_of(const at::Tensor& tensor, const std::vector<int64_t>& sizes, int world, const char* what) {
  const int64_t rows = tensor.dim() ? tensor.size(0) : 1;
  std::vector<int64_t> each = sizes;
  if (each.empty()) {
    if (rows % world) {
      throw Unusable(std::string(what) + " has " + std::to_string(rows) + " rows, not a multiple of " + std::to_string(world));
    }
    each.assign(world, rows / world);
  }
  if (static_cast<int>(each.size()) != world || std::accumulate(each.begin(), each.end(), int64_t{0}) != rows) {
    throw Unusable(std::string("the split sizes of ") + what + " do not add up to its " + std::to_string(rows) + " rows");
  }
  const int64_t row = rows ? tensor.numel() / rows : 0;
  const at::Tensor flat = tensor.view({-1});
  Tensors parts;
  int64_t begin = 0;
  for (const int64_t count : each) {
    parts.push_back(flat.narrow(0, begin * row, count * row));
    begin += count;
  }
  return parts;
}

}  // namespace

ShoalBackend::WorkPtr ShoalBackend::gather(Lists& outs, Tensors& ins, const c10d::GatherOptions& opts) {
  const at::Tensor& in = only(ins, "gather");
  return call(OpType::GATHER, "shoal:gather", opts.asyncOp, opts.timeout, lists_of(outs),
              [this, in, lists = outs, root = opts.rootRank](Doing& doing) {
                check(in);
                check_root(root);
                const bool here = rank_ == root;
                if (here && (lists.size() != 1 || static_cast<int>(lists[0].size()) != size_)) {
                  throw Unusable("gather takes an output a rank at the root: " + std::to_string(size_));
                }
                for (int r = 0; here && r < size_; ++r) {
                  check(lists[0][r]);
                  same_type(in, lists[0][r]);
                  same_count(lists[0][r].numel(), in.numel(), "gather's output for rank " + std::to_string(r));
                }
                const Elements elements(in);
                const Row row(in);
                const auto rows = here ? rows_of(lists[0], false) : std::vector<Row>();
                const auto places = places_of(rows);
                if (one_host()) {
                  local_->gather(row.data(), here ? places.data() : nullptr, elements.count, elements.dtype,
                                 static_cast<int>(root), doing.timeout_s);
                } else {  // an all-to-all in which only the root gets anything
                  ask_for(doing.request, in, elements.count);
                  doing.request.root = static_cast<int>(root);
                  std::vector<std::size_t> counts(size_, 0), all(size_, here ? elements.count : 0);
                  counts[root] = elements.count;
                  between_->all_to_all(doing, std::vector<void*>(size_, row.data()), counts,
                                       here ? places : std::vector<void*>(size_, row.data()), all, elements.dtype);
                }
                back(rows);
              });
}

ShoalBackend::WorkPtr ShoalBackend::scatter(Tensors& outs, Lists& ins, const c10d::ScatterOptions& opts) {
  const at::Tensor& out = only(outs, "scatter");
  return call(OpType::SCATTER, "shoal:scatter", opts.asyncOp, opts.timeout, list_of(outs),
              [this, out, lists = ins, root = opts.rootRank](Doing& doing) {
                check(out);
                check_root(root);
                const bool here = rank_ == root;
                if (here && (lists.size() != 1 || static_cast<int>(lists[0].size()) != size_)) {
                  throw Unusable("scatter takes an input a rank at the root: " + std::to_string(size_));
                }
                for (int r = 0; here && r < size_; ++r) {
                  check(lists[0][r]);
                  same_type(lists[0][r], out);
                  same_count(lists[0][r].numel(), out.numel(), "scatter's input for rank " + std::to_string(r));
                }
                const Elements elements(out);
                const auto rows = here ? rows_of(lists[0], true) : std::vector<Row>();
                const auto places = places_of(rows);
                const Row mine(out, false);
                if (one_host()) {
                  local_->scatter(here ? places.data() : nullptr, mine.data(), elements.count, elements.dtype,
                                  static_cast<int>(root), doing.timeout_s);
                } else {
                  ask_for(doing.request, out, elements.count);
                  doing.request.root = static_cast<int>(root);
                  std::vector<std::size_t> counts(size_, 0), all(size_, here ? elements.count : 0);
                  counts[root] = elements.count;
                  between_->all_to_all(doing, here ? places : std::vector<void*>(size_, mine.data()), all,
                                       std::vector<void*>(size_, mine.data()), counts, elements.dtype);
                }
                mine.back();
              });
}

void ShoalBackend::all_to_all(Doing& doing, const Tensors& ins, const Tensors& outs) {
  if (static_cast<int>(ins.size()) != size_ || static_cast<int>(outs.size()) != size_) {
    throw Unusable("all_to_all takes an input and an output a rank: " + std::to_string(size_));
  }
  for (int r = 0; r < size_; ++r) {
    check(ins[r]);
    check(outs[r]);
    same_type(ins[0], ins[r]);
    same_type(ins[0], outs[r]);
  }
  const auto from = rows_of(ins, true), to = rows_of(outs, false);
  const auto from_places = places_of(from), to_places = places_of(to);
  const auto from_counts = counts_of(ins), to_counts = counts_of(outs);
  const DType dtype = Elements(ins[0]).dtype;
  if (one_host()) {
    local_->all_to_all(from_places.data(), from_counts.data(), to_places.data(), to_counts.data(), dtype,
                       doing.timeout_s);
  } else {
    ask_for(doing.request, ins[0], 0);  // counts differ from rank to rank; they are compared pair by pair
    between_->all_to_all(doing, from_places, from_counts, to_places, to_counts, dtype);
  }
  back(to);
}

ShoalBackend::WorkPtr ShoalBackend::alltoall(Tensors& outs, Tensors& ins, const c10d::AllToAllOptions& opts) {
  return call(OpType::ALLTOALL, "shoal:all_to_all", opts.asyncOp, opts.timeout, list_of(outs),
              [this, ins, outs](Doing& doing) { all_to_all(doing, ins, outs); });
}

ShoalBackend::WorkPtr ShoalBackend::alltoall_base(at::Tensor& out, at::Tensor& in, std::vector<int64_t>& out_sizes,
                                                  std::vector<int64_t>& in_sizes, const c10d::AllToAllOptions& opts) {
  return call(OpType::ALLTOALL_BASE, "shoal:all_to_all", opts.asyncOp, opts.timeout, list_of({out}),
              [this, in, out, out_sizes, in_sizes](Doing& doing) {
                check(in);
                check(out);
                same_type(in, out);
                const Row from(in), to(out, false);
                all_to_all(doing, parts_of(from.row, in_sizes, size_, "all_to_all's input"),
                           parts_of(to.row, out_sizes, size_, "all_to_all's output"));
                to.back();
              });
}

ShoalBackend::WorkPtr ShoalBackend::barrier(const c10d::BarrierOptions& opts) {
  return call(OpType::BARRIER, "shoal:barrier", opts.asyncOp, opts.timeout, {}, [this](Doing& doing) {
    if (one_host()) {
      local_->barrier(doing.timeout_s);
    } else {
      between_->agree(doing);
    }
  });
}

void ShoalBackend::monitoredBarrier(const c10d::BarrierOptions& opts, bool) {
  c10d::BarrierOptions now = opts;
  now.asyncOp = false;
  barrier(now);
}

}  // namespace shoal
