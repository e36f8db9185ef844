// Names and sizes of what the transport knows.
#include "shm_types.hpp"

namespace shoal {

std::size_t size_of(DType dtype) {
  constexpr std::size_t sizes[kDTypes] = {4, 8, 2, 2, 1, 1, 2, 4, 8, 2, 4, 8, 1, 8, 16, 1, 1};
  return sizes[static_cast<int>(dtype)];
}

const char* name_of(DType dtype) {
  constexpr const char* names[kDTypes] = {"float32", "float64", "float16", "bfloat16",  "int8",       "uint8",
                                          "int16",   "int32",   "int64",   "uint16",    "uint32",     "uint64",
                                          "bool",    "complex64", "complex128", "float8", "bytes"};
  return names[static_cast<int>(dtype)];
}

const char* name_of(ReduceOp op) {
  constexpr const char* names[kReduceOps] = {"sum", "avg", "product", "min", "max", "band", "bor", "bxor"};
  return names[static_cast<int>(op)];
}

const char* name_of(Op op) {
  constexpr const char* names[kOps] = {"barrier",        "all_reduce", "reduce",  "broadcast",  "all_gather",
                                       "reduce_scatter", "gather",     "scatter", "all_to_all"};
  return names[static_cast<int>(op)];
}

bool can_reduce(DType dtype, ReduceOp op) {
  const bool bits = op == ReduceOp::band || op == ReduceOp::bor || op == ReduceOp::bxor;
  const bool order = op == ReduceOp::min || op == ReduceOp::max;
  switch (dtype) {
    case DType::f32:
    case DType::f64:
    case DType::f16:
    case DType::bf16:
      return !bits;
    case DType::c64:
    case DType::c128:
      return !bits && !order;
    case DType::f8:
    case DType::raw:
      return false;
    default:
      return op != ReduceOp::avg;
  }
}

}  // namespace shoal
