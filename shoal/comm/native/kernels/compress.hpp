// What the compressors share. Every kernel here has a twin in PyTorch (shoal/comm/compression) that gives the same bits:
// sums are taken in an order written out below, never one that a compiler or a vector width would choose.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "float16.hpp"
#include "vector.hpp"

namespace shoal {

constexpr std::int64_t kBlock = 2048;           // elements that share one scale: 8 KiB, well within a first cache
constexpr std::uint32_t kMagnitude = 0x7fffffffu;
constexpr std::uint32_t kSign = 0x80000000u;
constexpr std::uint32_t kInfinity = 0x7f800000u;  // magnitudes from here on are not finite
constexpr std::uint32_t kNan = 0x7fc00000u;       // the one NaN that is ever written
constexpr std::uint32_t kSmallestNormal = 0x00800000u;

// What is to be sent: the gradient and, with error feedback, what earlier steps left unsent.
template <bool Feedback>
SHOAL_INLINE float wanted(const float* gradient, const float* error, std::int64_t i) {
  return Feedback ? gradient[i] + error[i] : gradient[i];
}

SHOAL_INLINE float finite_or_zero(float rest) {
  const std::uint32_t word = bits_of(rest);
  return float_of(choose((word & kMagnitude) < kInfinity, word, 0u));
}

}  // namespace shoal
