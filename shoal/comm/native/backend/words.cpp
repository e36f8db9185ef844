#include "words.hpp"

#include <cstring>

namespace shoal {

std::optional<ReduceOp> reduce_op_of(const c10d::ReduceOp& op) {
  switch (op.op_) {
    case c10d::ReduceOp::SUM: return ReduceOp::sum;
    case c10d::ReduceOp::AVG: return ReduceOp::avg;
    case c10d::ReduceOp::PRODUCT: return ReduceOp::product;
    case c10d::ReduceOp::MIN: return ReduceOp::min;
    case c10d::ReduceOp::MAX: return ReduceOp::max;
    case c10d::ReduceOp::BAND: return ReduceOp::band;
    case c10d::ReduceOp::BOR: return ReduceOp::bor;
    case c10d::ReduceOp::BXOR: return ReduceOp::bxor;
    default: return std::nullopt;
  }
}

DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kHalf: return DType::f16;
    case at::kBFloat16: return DType::bf16;
    case at::kChar: return DType::i8;
    case at::kByte: return DType::u8;
    case at::kShort: return DType::i16;
    case at::kInt: return DType::i32;
    case at::kLong: return DType::i64;
    case at::kUInt16: return DType::u16;
    case at::kUInt32: return DType::u32;
    case at::kUInt64: return DType::u64;
    case at::kBool: return DType::boolean;
    case at::kComplexFloat: return DType::c64;
    case at::kComplexDouble: return DType::c128;
    case at::kFloat8_e5m2:
    case at::kFloat8_e4m3fn:
    case at::kFloat8_e5m2fnuz:
    case at::kFloat8_e4m3fnuz: return DType::f8;
    default: return DType::raw;
  }
}

Elements::Elements(const at::Tensor& tensor)
    : dtype(dtype_of(tensor.scalar_type())),
      count(static_cast<std::size_t>(tensor.numel()) * (dtype == DType::raw ? tensor.element_size() : 1)) {}

Row::Row(const at::Tensor& tensor_, bool filled)
    : tensor(tensor_),
      row(tensor_.is_contiguous() && !tensor_.is_conj() && !tensor_.is_neg() ? tensor_
          : filled ? tensor_.resolve_conj().resolve_neg().contiguous()
                   : at::empty(tensor_.sizes(), tensor_.options().memory_format(at::MemoryFormat::Contiguous))) {}

void Row::back() const {
  if (!row.is_same(tensor)) {
    at::Tensor to = tensor;
    to.copy_(row);
  }
}

std::vector<Row> rows_of(const std::vector<at::Tensor>& tensors, bool filled) {
  std::vector<Row> rows;
  rows.reserve(tensors.size());
  for (const auto& tensor : tensors) rows.emplace_back(tensor, filled);
  return rows;
}

std::vector<void*> places_of(const std::vector<Row>& rows) {
  std::vector<void*> places;
  places.reserve(rows.size());
  for (const auto& row : rows) places.push_back(row.data());
  return places;
}

namespace {

const char* name_of(c10d::OpType type) {  // as torch.distributed calls it
  switch (type) {
    case c10d::OpType::ALLREDUCE: return "all_reduce";
    case c10d::OpType::ALLREDUCE_COALESCED: return "all_reduce_coalesced";
    case c10d::OpType::_ALLREDUCE_SPARSE: return "all_reduce of a sparse tensor";
    case c10d::OpType::BROADCAST: return "broadcast";
    case c10d::OpType::REDUCE: return "reduce";
    case c10d::OpType::ALLGATHER:
    case c10d::OpType::_ALLGATHER_BASE: return "all_gather";
    case c10d::OpType::ALLGATHER_COALESCED:
    case c10d::OpType::COALESCED: return "all_gather_coalesced";
    case c10d::OpType::REDUCE_SCATTER:
    case c10d::OpType::_REDUCE_SCATTER_BASE: return "reduce_scatter";
    case c10d::OpType::REDUCE_SCATTER_TENSOR_COALESCED: return "reduce_scatter_coalesced";
    case c10d::OpType::GATHER: return "gather";
    case c10d::OpType::SCATTER: return "scatter";
    case c10d::OpType::ALLTOALL:
    case c10d::OpType::ALLTOALL_BASE: return "all_to_all";
    case c10d::OpType::BARRIER: return "barrier";
    default: return "another collective";
  }
}

}  // namespace

bool Request::agrees(const Request& o) const {
  return sequence == o.sequence && count == o.count && shape == o.shape && root == o.root && type == o.type &&
         dtype == o.dtype && reduce == o.reduce && unusable == o.unusable;
}

std::string Request::text() const {
  std::string text = "call " + std::to_string(sequence) + ", ";
  text += name_of(static_cast<c10d::OpType>(type));
  if (unusable) return text + " with arguments that cannot be used";
  if (dtype == 255) return text;
  text += "(";
  if (reduce != 255) {
    text += std::string(reduce < kReduceOps ? name_of(static_cast<ReduceOp>(reduce)) : "another reduction") + ", ";
  }
  const auto element = static_cast<at::ScalarType>(dtype);
  text += dtype_of(element) == DType::raw ? at::toString(element) : name_of(dtype_of(element));
  text += ", " + std::to_string(count) + " elements";
  if (shape) text += ", sizes " + std::to_string(shape % 65536);
  if (root >= 0) text += ", root " + std::to_string(root);
  return text + ")";
}

std::uint64_t digest_of(const std::vector<std::size_t>& counts) {
  std::uint64_t digest = 0x9e3779b97f4a7c15ull;
  bool even = true;
  for (const std::size_t count : counts) {
    digest = (digest ^ count) * 0xff51afd7ed558ccdull;
    digest ^= digest >> 32;
    even = even && count == counts[0];
  }
  return even ? 0 : digest | 1;
}

std::string bytes_text(std::size_t bytes) { return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes"); }

std::string rank_list(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) text += (i ? ", " : "") + std::to_string(ranks[i]);
  return text;
}

}  // namespace shoal
