// Finishing a slice of the reduction tree in one pass over memory: additions, division, sums of squares.
#include <cstddef>
#include <cstdint>

#include "vector.hpp"

namespace {
constexpr std::int64_t kBlock = 32768;  // elements: shoal.comm.layout.BLOCK
constexpr std::int64_t kLanes = 2048;   // elements: shoal.comm.finishing.LANES; what goes through all additions at once

template <typename T>
inline __attribute__((always_inline)) void finish(std::int64_t pieces, const std::int64_t* places, T* const* pointers,
                                                  std::int64_t operands, std::int64_t additions,
                                                  const std::int32_t* adds, T by, double* squares) {
  alignas(64) double lanes[kLanes];  // lane l: the sum over rows of the squares of a block's elements l, l + kLanes, ...
  std::int64_t block = -1;
  const auto close = [&] {
    for (std::int64_t width = kLanes / 2; width > 0; width /= 2)
      for (std::int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    squares[block] = lanes[0];
  };
  for (std::int64_t p = 0; p < pieces; ++p) {
    const std::int64_t start = places[2 * p], length = places[2 * p + 1];
    T* const* piece = pointers + p * operands;
    if (squares && start / kBlock != block) {
      if (block >= 0) close();
      block = start / kBlock;
      for (double& lane : lanes) lane = 0.0;
    }
    for (std::int64_t from = 0, count; from < length; from += count) {
      const std::int64_t lane = (start + from) % kLanes;
      count = length - from < kLanes - lane ? length - from : kLanes - lane;
      for (std::int64_t a = 0; a < additions; ++a) {
        T* __restrict into = piece[adds[2 * a]] + from;
        const T* __restrict other = piece[adds[2 * a + 1]] + from;
        for (std::int64_t i = 0; i < count; ++i) into[i] += other[i];
      }
      T* __restrict total = piece[0] + from;
      if (by != T(1))
        for (std::int64_t i = 0; i < count; ++i) total[i] /= by;
      if (squares) {
        double* __restrict sums = lanes + lane;
        for (std::int64_t i = 0; i < count; ++i) {
          const double value = total[i];
          sums[i] += value * value;
        }
      }
    }
  }
  if (squares && block >= 0) close();
}
}  // namespace

// For each piece p of a slice, whose elements lie at places[2p] .. + places[2p+1] of the slice and for operand o at
// pointers[p * operands + o]: operand adds[2a] += operand adds[2a+1] for each a in order, then operand 0 /= by; and for
// each block of the slice (pieces do not cross blocks, and come in order) the sum of squares into squares[block], in the
// order of shoal.comm.finishing.block_squares. squares may be null. Operands must not overlap.
SHOAL_VECTOR void finish_f32(std::int64_t pieces, const std::int64_t* places, float* const* pointers,
                             std::int64_t operands, std::int64_t additions, const std::int32_t* adds, float by,
                             double* squares) {
  finish<float>(pieces, places, pointers, operands, additions, adds, by, squares);
}
SHOAL_VECTOR void finish_f64(std::int64_t pieces, const std::int64_t* places, double* const* pointers,
                             std::int64_t operands, std::int64_t additions, const std::int32_t* adds, double by,
                             double* squares) {
  finish<double>(pieces, places, pointers, operands, additions, adds, by, squares);
}

SHOAL_EXPORT void shoal_finish_f32(std::int64_t pieces, const std::int64_t* places, float* const* pointers,
                                   std::int64_t operands, std::int64_t additions, const std::int32_t* adds, double by,
                                   double* squares) {
  finish_f32(pieces, places, pointers, operands, additions, adds, static_cast<float>(by), squares);
}
SHOAL_EXPORT void shoal_finish_f64(std::int64_t pieces, const std::int64_t* places, double* const* pointers,
                                   std::int64_t operands, std::int64_t additions, const std::int32_t* adds, double by,
                                   double* squares) {
  finish_f64(pieces, places, pointers, operands, additions, adds, by, squares);
}
