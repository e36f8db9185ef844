// Optimiser states in 8 bits a value: blocks of 256 share one scale, and a code is the number of the nearest of 256 values.
// The tables are those of the twin, shoal/memory/quantised.py: one look-up finds the code up to one edge, which is compared.
#include <cstdint>
#include <cstring>

#include "vector.hpp"

namespace {
constexpr std::int64_t kBlock = 256;
constexpr std::uint32_t kMagnitude = 0x7fffffffu;

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <bool Signed>
inline __attribute__((always_inline)) void encode_block(const float* __restrict values, std::uint8_t* __restrict codes,
                                                        float* scale, const std::uint8_t* __restrict least,
                                                        const float* __restrict edges, std::int64_t count) {
  std::int32_t largest = 0;  // as bits: magnitudes of finite numbers lie in the order of whole ones
  for (std::int64_t i = 0; i < count; ++i) {
    const auto magnitude = static_cast<std::int32_t>(bits_of(values[i]) & kMagnitude);
    largest = magnitude > largest ? magnitude : largest;
  }
  std::memcpy(scale, &largest, sizeof largest);
  const float divisor = largest > 0 ? *scale : 1.0f;
  float shares[kBlock];
  for (std::int64_t i = 0; i < count; ++i) shares[i] = values[i] / divisor;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t upper = bits_of(shares[i]) >> 16;
    auto code = static_cast<std::uint8_t>(least[upper] + (shares[i] > edges[upper]));
    if (!Signed && code == 0 && shares[i] > 0.0f) code = 1;  // what is divided by must not become nought
    codes[i] = code;
  }
}

template <bool Signed>
inline __attribute__((always_inline)) void encode(const float* values, std::uint8_t* codes, float* scales,
                                                  const std::uint8_t* least, const float* edges, std::int64_t n) {
  for (std::int64_t start = 0; start < n; start += kBlock) {
    const std::int64_t count = n - start < kBlock ? n - start : kBlock;
    encode_block<Signed>(values + start, codes + start, scales + start / kBlock, least, edges, count);
  }
}

SHOAL_VECTOR void with_sign(const float* v, std::uint8_t* c, float* s, const std::uint8_t* l, const float* e,
                            std::int64_t n) {
  encode<true>(v, c, s, l, e, n);
}

SHOAL_VECTOR void without_sign(const float* v, std::uint8_t* c, float* s, const std::uint8_t* l, const float* e,
                               std::int64_t n) {
  encode<false>(v, c, s, l, e, n);
}

SHOAL_VECTOR void decode(const std::uint8_t* __restrict codes, const float* __restrict scales,
                         const float* __restrict table, float* __restrict into, std::int64_t n) {
  for (std::int64_t start = 0; start < n; start += kBlock) {
    const std::int64_t end = n - start < kBlock ? n : start + kBlock;
    const float scale = scales[start / kBlock];
    for (std::int64_t i = start; i < end; ++i) into[i] = table[codes[i]] * scale;
  }
}
}  // namespace

SHOAL_EXPORT void shoal_quantised_encode(const float* values, std::uint8_t* codes, float* scales,
                                         const std::uint8_t* least, const float* edges, std::int64_t n,
                                         std::int64_t has_sign) {
  if (has_sign) {
    with_sign(values, codes, scales, least, edges, n);
  } else {
    without_sign(values, codes, scales, least, edges, n);
  }
}

SHOAL_EXPORT void shoal_quantised_decode(const std::uint8_t* codes, const float* scales, const float* table,
                                         float* into, std::int64_t n) {
  decode(codes, scales, table, into, n);
}
