// 16-bit floats to f32 and back by integer operations, which compilers turn into vectors on any machine.
#pragma once

#include <cstdint>
#include <cstring>

#define SHOAL_INLINE inline __attribute__((always_inline))

namespace shoal {

SHOAL_INLINE std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
SHOAL_INLINE float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SHOAL_INLINE float f32_of_bf16(std::uint16_t half) { return float_of(static_cast<std::uint32_t>(half) << 16); }

// `yes` or `no` by a mask: compilers move an addition (it may raise a flag) under a branch and do not vectorise.
SHOAL_INLINE std::uint32_t choose(bool condition, std::uint32_t yes, std::uint32_t no) {
  const std::uint32_t mask = 0u - static_cast<std::uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// Round to nearest, ties to even; a NaN stays one (the carry of rounding could make it infinite).
SHOAL_INLINE std::uint16_t bf16_of_f32(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Subnormal halves are made by a subtraction of normal numbers, so that a flush-to-zero mode does not lose them.
SHOAL_INLINE float f32_of_f16(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t rest = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
  const std::uint32_t exponent = rest & 0x0f800000u;
  const std::uint32_t normal = rest + (exponent == 0x0f800000u ? 0x70000000u : 0x38000000u);  // infinite, NaN: 255
  const std::uint32_t tiny = bits_of(float_of(rest + 0x38800000u) - float_of(0x38800000u));
  return float_of(sign | choose(exponent == 0, tiny, normal));
}

// Round to nearest, ties to even; too large becomes infinite, a NaN keeps what fits of its bits, as the hardware does.
SHOAL_INLINE std::uint16_t f16_of_f32(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t size = bits & 0x7fffffffu;
  const std::uint32_t normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  const std::uint32_t tiny = bits_of(float_of(size) + 0.5f) - 0x3f000000u;  // the adder rounds at 2^-24
  const std::uint32_t special = size > 0x7f800000u ? 0x7e00u | ((size >> 13) & 0x3ffu) : 0x7c00u;
  const std::uint32_t finite = choose(size < 0x38800000u, tiny, normal);
  return static_cast<std::uint16_t>(sign | choose(size >= 0x477ff000u, special, finite));
}

}  // namespace shoal
