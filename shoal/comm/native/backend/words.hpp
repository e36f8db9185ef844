// Between torch's words for tensors and collectives and the transport's.
#pragma once

#include <torch/csrc/distributed/c10d/Types.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <optional>
#include <string>
#include <vector>

#include "shm_types.hpp"

namespace shoal {

std::optional<ReduceOp> reduce_op_of(const c10d::ReduceOp&);
DType dtype_of(at::ScalarType);  // raw: what is only bytes to the transport
inline double seconds_of(std::chrono::milliseconds timeout) {  // 0: the group's
  return timeout.count() > 0 ? static_cast<double>(timeout.count()) / 1e3 : 0.0;
}

// The elements of a tensor as the transport counts them.
struct Elements {
  DType dtype;
  std::size_t count;
  explicit Elements(const at::Tensor&);
};

// The tensor's elements in a row: its own memory where they lie so, else a copy.
struct Row {
  explicit Row(const at::Tensor& tensor, bool filled = true);
  void* data() const { return row.data_ptr(); }
  void back() const;  // the result is in the tensor
  at::Tensor tensor, row;
};
std::vector<Row> rows_of(const std::vector<at::Tensor>& tensors, bool filled);
std::vector<void*> places_of(const std::vector<Row>& rows);

// What a caller passed cannot be used. The other ranks must hear of it: they are in the call already.
struct Unusable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a rank asks for, where torch's own words for it are compared: between hosts, and before gloo does it.
struct Request {
  std::uint64_t sequence = 0, count = 0, shape = 0;
  std::int32_t root = -1;
  std::uint8_t type = 0, dtype = 255, reduce = 255, unusable = 0;
  bool agrees(const Request&) const;
  std::string text() const;
};
static_assert(sizeof(Request) == 32);

std::uint64_t digest_of(const std::vector<std::size_t>& counts);  // 0: all are equal
std::string bytes_text(std::size_t bytes);
std::string rank_list(const std::vector<int>& ranks);

}  // namespace shoal
