// Blocks of 2048 elements as whole numbers from -127 to 127 and one float32 scale. Payload: all scales, then all numbers.
#include "compress.hpp"

namespace {
using namespace shoal;

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, ties to even, in the low bits

template <bool Feedback>
SHOAL_INLINE void compress_block(const float* __restrict gradient, float* __restrict error, std::int8_t* __restrict out,
                                 float* scale_out, std::int64_t count) {
  float values[kBlock];
  std::int32_t largest = 0;  // as bits: the order of magnitudes is that of whole numbers, and NaN is above infinity
  for (std::int64_t i = 0; i < count; ++i) {
    values[i] = wanted<Feedback>(gradient, error, i);
    const std::int32_t magnitude = static_cast<std::int32_t>(bits_of(values[i]) & kMagnitude);
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= static_cast<std::int32_t>(kInfinity)) {  // the block arrives as NaN, and no error outlives it
    *scale_out = float_of(kNan);
    std::memset(out, 0, static_cast<std::size_t>(count));
    if (Feedback) std::memset(error, 0, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  float scale = float_of(static_cast<std::uint32_t>(largest)) / 127.0f;
  const bool tiny = bits_of(scale) < kSmallestNormal;  // its reciprocal could overflow: all stays in the error
  scale = tiny ? 0.0f : scale;
  const float inverse = tiny ? 0.0f : 1.0f / scale;
  *scale_out = scale;
  for (std::int64_t i = 0; i < count; ++i) {
    const float rounded = values[i] * inverse + kRound;
    out[i] = static_cast<std::int8_t>(bits_of(rounded) & 0xffu);
    if (Feedback) error[i] = values[i] - (rounded - kRound) * scale;
  }
}

template <bool Feedback>
SHOAL_INLINE void compress(const float* gradient, float* error, std::uint8_t* payload, std::int64_t n) {
  const std::int64_t blocks = (n + kBlock - 1) / kBlock;
  auto* scales = reinterpret_cast<float*>(payload);
  auto* numbers = reinterpret_cast<std::int8_t*>(payload + blocks * static_cast<std::int64_t>(sizeof(float)));
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t start = b * kBlock, count = n - start < kBlock ? n - start : kBlock;
    compress_block<Feedback>(gradient + start, Feedback ? error + start : nullptr, numbers + start, scales + b, count);
  }
}

template <bool Add>
SHOAL_INLINE void decompress(const std::uint8_t* payload, float* into, std::int64_t n) {
  const std::int64_t blocks = (n + kBlock - 1) / kBlock;
  const auto* scales = reinterpret_cast<const float*>(payload);
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t start = b * kBlock, count = n - start < kBlock ? n - start : kBlock;
    const auto* __restrict numbers = reinterpret_cast<const std::int8_t*>(scales + blocks) + start;
    float* __restrict out = into + start;
    const float scale = scales[b];
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = static_cast<float>(numbers[i]) * scale;
      out[i] = Add ? out[i] + value : value;
    }
  }
}

SHOAL_VECTOR void fed(const float* g, float* e, std::uint8_t* p, std::int64_t n) { compress<true>(g, e, p, n); }
SHOAL_VECTOR void bare(const float* g, std::uint8_t* p, std::int64_t n) { compress<false>(g, nullptr, p, n); }
SHOAL_VECTOR void add(const std::uint8_t* p, float* into, std::int64_t n) { decompress<true>(p, into, n); }
SHOAL_VECTOR void restore(const std::uint8_t* p, float* into, std::int64_t n) { decompress<false>(p, into, n); }
}  // namespace

SHOAL_EXPORT void shoal_int8_compress(const float* g, float* e, std::uint8_t* p, std::int64_t n) {
  e ? fed(g, e, p, n) : bare(g, p, n);
}
SHOAL_EXPORT void shoal_int8_add(const std::uint8_t* p, float* into, std::int64_t n) { add(p, into, n); }
SHOAL_EXPORT void shoal_int8_restore(const std::uint8_t* p, float* into, std::int64_t n) { restore(p, into, n); }
