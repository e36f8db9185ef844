// Finishing a slice of the reduction tree in one pass over memory.
#include <cstddef>
#include <cstdint>

#include "vector.hpp"

namespace {
// Blocks fit a core's first cache: a block goes through all additions and the division before the next one is read.
constexpr std::size_t kBlock = 2048;

template <typename T>
inline __attribute__((always_inline)) void finish(T* const* operands, const std::int32_t* adds, std::int64_t count,
                                                  std::int64_t elements, T by) {
  for (std::int64_t start = 0; start < elements; start += kBlock) {
    const std::int64_t stop = start + static_cast<std::int64_t>(kBlock) < elements ? start + kBlock : elements;
    for (std::int64_t a = 0; a < count; ++a) {
      T* __restrict into = operands[adds[2 * a]];
      const T* __restrict other = operands[adds[2 * a + 1]];
      for (std::int64_t i = start; i < stop; ++i) into[i] += other[i];
    }
    if (by != T(1)) {
      T* total = operands[0];
      for (std::int64_t i = start; i < stop; ++i) total[i] /= by;
    }
  }
}
}  // namespace

// operands[adds[2i]] += operands[adds[2i+1]] for each i in order, then operands[0] /= by: the same bits as torch's
// add_ and div_, element by element. Operands must not overlap.
SHOAL_VECTOR void finish_f32(float* const* operands, const std::int32_t* adds, std::int64_t count,
                             std::int64_t elements, float by) {
  finish<float>(operands, adds, count, elements, by);
}
SHOAL_VECTOR void finish_f64(double* const* operands, const std::int32_t* adds, std::int64_t count,
                             std::int64_t elements, double by) {
  finish<double>(operands, adds, count, elements, by);
}

SHOAL_EXPORT void shoal_finish_f32(float* const* operands, const std::int32_t* adds, std::int64_t count,
                                   std::int64_t elements, float by) {
  finish_f32(operands, adds, count, elements, by);
}
SHOAL_EXPORT void shoal_finish_f64(double* const* operands, const std::int32_t* adds, std::int64_t count,
                                   std::int64_t elements, double by) {
  finish_f64(operands, adds, count, elements, by);
}
