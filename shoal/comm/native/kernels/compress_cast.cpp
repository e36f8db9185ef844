// float32 <-> the two 16-bit formats, rounded to nearest, ties to even; finite numbers that are too large become the
// largest finite one, and the error keeps the rest.
#include "compress.hpp"

namespace {
using namespace shoal;

// A finite number stays finite, and there is one NaN of either sign (a NaN's carry may have reached `half`'s sign).
SHOAL_INLINE std::uint16_t tamed(float value, std::uint16_t half, std::uint32_t infinity, std::uint32_t nan) {
  const std::uint32_t magnitude = bits_of(value) & kMagnitude, sign = (bits_of(value) >> 16) & 0x8000u;
  std::uint32_t rest = half & 0x7fffu;
  rest = choose(magnitude < kInfinity && rest >= infinity, infinity - 1, rest);
  rest = choose(magnitude > kInfinity, nan, rest);
  return static_cast<std::uint16_t>(sign | rest);
}

struct Bfloat16 {
  static SHOAL_INLINE std::uint16_t from(float value) {
    const std::uint32_t word = bits_of(value);
    const std::uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    return tamed(value, static_cast<std::uint16_t>(rounded), 0x7f80u, 0x7fc0u);
  }
  static SHOAL_INLINE float back(std::uint16_t half) { return f32_of_bf16(half); }
};

struct Float16 {
  static SHOAL_INLINE std::uint16_t from(float value) { return tamed(value, f16_of_f32(value), 0x7c00u, 0x7e00u); }
  static SHOAL_INLINE float back(std::uint16_t half) { return f32_of_f16(half); }
};

template <typename Half, bool Feedback>
SHOAL_INLINE void compress(const float* __restrict gradient, float* __restrict error, std::uint16_t* __restrict payload,
                           std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float value = wanted<Feedback>(gradient, error, i);
    const std::uint16_t half = Half::from(value);
    payload[i] = half;
    if (Feedback) error[i] = finite_or_zero(value - Half::back(half));
  }
}

template <typename Half>
SHOAL_INLINE void add(const std::uint16_t* __restrict payload, float* __restrict into, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) into[i] += Half::back(payload[i]);
}

template <typename Half>
SHOAL_INLINE void restore(const std::uint16_t* __restrict payload, float* __restrict into, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) into[i] = Half::back(payload[i]);
}
// The dispatched loops, by format and by whether there is an error to feed back (a null pointer: none).
#define SHOAL_CAST_LOOPS(NAME, HALF)                                                                           \
  SHOAL_VECTOR void NAME##_fed(const float* g, float* e, std::uint16_t* p, std::int64_t n) {                   \
    compress<HALF, true>(g, e, p, n);                                                                          \
  }                                                                                                            \
  SHOAL_VECTOR void NAME##_bare(const float* g, std::uint16_t* p, std::int64_t n) {                            \
    compress<HALF, false>(g, nullptr, p, n);                                                                   \
  }                                                                                                            \
  SHOAL_VECTOR void NAME##_add(const std::uint16_t* p, float* into, std::int64_t n) { add<HALF>(p, into, n); } \
  SHOAL_VECTOR void NAME##_restore(const std::uint16_t* p, float* into, std::int64_t n) {                      \
    restore<HALF>(p, into, n);                                                                                 \
  }

SHOAL_CAST_LOOPS(bf16, Bfloat16)
SHOAL_CAST_LOOPS(fp16, Float16)
}  // namespace

#define SHOAL_CAST(NAME)                                                                                  \
  SHOAL_EXPORT void shoal_##NAME##_compress(const float* g, float* e, std::uint16_t* p, std::int64_t n) { \
    e ? NAME##_fed(g, e, p, n) : NAME##_bare(g, p, n);                                                    \
  }                                                                                                       \
  SHOAL_EXPORT void shoal_##NAME##_add(const std::uint16_t* p, float* into, std::int64_t n) {             \
    NAME##_add(p, into, n);                                                                               \
  }                                                                                                       \
  SHOAL_EXPORT void shoal_##NAME##_restore(const std::uint16_t* p, float* into, std::int64_t n) {         \
    NAME##_restore(p, into, n);                                                                           \
  }

SHOAL_CAST(bf16)
SHOAL_CAST(fp16)
