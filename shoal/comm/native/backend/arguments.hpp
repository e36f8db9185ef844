// What all operations check and convert.
#pragma once

#include <numeric>

#include "backend.hpp"

namespace shoal {

using c10d::OpType;
using Tensors = ShoalBackend::Tensors;
using Lists = ShoalBackend::Lists;

inline const at::Tensor& only(const Tensors& tensors, const char* what) {
  if (tensors.size() != 1) {
    throw c10::ValueError(std::string(what) + " takes one tensor a rank, got " + std::to_string(tensors.size()), nullptr,
                          nullptr);
  }
  return tensors[0];
}

inline Results list_of(const Tensors& tensors) { return {tensors, {}, false}; }
inline Results lists_of(const Lists& lists) { return {{}, lists, true}; }

inline void same_type(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type()) {
    throw Unusable(std::string("input is ") + at::toString(a.scalar_type()) + " and output is " +
                   at::toString(b.scalar_type()) + ": a collective converts nothing");
  }
}

inline void same_count(int64_t got, int64_t needed, const std::string& what) {
  if (got != needed) {
    throw Unusable(what + " has " + std::to_string(got) + " elements where " + std::to_string(needed) + " are needed");
  }
}

inline std::vector<std::size_t> counts_of(const Tensors& tensors) {
  std::vector<std::size_t> counts;
  counts.reserve(tensors.size());
  for (const auto& tensor : tensors) counts.push_back(Elements(tensor).count);
  return counts;
}

inline void ask_for(Request& request, const at::Tensor& tensor, std::size_t count) {
  request.dtype = static_cast<std::uint8_t>(tensor.scalar_type());
  request.count = count;
}

inline void back(const std::vector<Row>& rows) {
  for (const auto& row : rows) row.back();
}

}  // namespace shoal
