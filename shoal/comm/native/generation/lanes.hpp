// Sixteen floats at once, for each instruction set. All three give the same bits: each lane is rounded by itself.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

#if defined(LANES_AVX512)

struct Lanes {
  __m512 v;
};
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Lanes load(const std::uint16_t* p) {  // bfloat16
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline Lanes all(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes smaller(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes nearest(Lanes a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Lanes power_of_two(Lanes n) {  // n whole, -126 .. 127
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
inline Lanes where_less(Lanes a, Lanes b, Lanes yes, Lanes no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}

#elif defined(LANES_AVX2)

struct Lanes {
  __m256 lo, hi;
};
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widened(const std::uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Lanes load(const std::uint16_t* p) { return {widened(p), widened(p + 8)}; }
inline void store(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Lanes smaller(Lanes a, Lanes b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline __m256 nearest(__m256 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Lanes nearest(Lanes a) { return {nearest(a.lo), nearest(a.hi)}; }
inline __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Lanes power_of_two(Lanes n) { return {power_of_two(n.lo), power_of_two(n.hi)}; }
inline __m256 where_less(__m256 a, __m256 b, __m256 yes, __m256 no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline Lanes where_less(Lanes a, Lanes b, Lanes yes, Lanes no) {
  return {where_less(a.lo, b.lo, yes.lo, no.lo), where_less(a.hi, b.hi, yes.hi, no.hi)};
}

#else

struct Lanes {
  float v[16];
};
template <typename F>
inline Lanes each(F f) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = f(i);
  return out;
}
inline Lanes load(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline Lanes load(const std::uint16_t* p) {
  return each([&](int i) {
    const std::uint32_t bits = std::uint32_t(p[i]) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  });
}
inline void store(float* p, const Lanes& a) { std::memcpy(p, a.v, sizeof a.v); }
inline Lanes all(float x) {
  return each([&](int) { return x; });
}
inline Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
  return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
inline Lanes operator+(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Lanes operator-(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Lanes operator*(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Lanes operator/(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Lanes larger(const Lanes& a, const Lanes& b) {  // the second where one is NaN, as the vector instructions do
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Lanes smaller(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Lanes nearest(const Lanes& a) {
  return each([&](int i) { return std::nearbyint(a.v[i]); });
}
inline Lanes power_of_two(const Lanes& n) {
  return each([&](int i) {
    const std::int32_t bits = (std::int32_t(n.v[i]) + 127) << 23;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  });
}
inline Lanes where_less(const Lanes& a, const Lanes& b, const Lanes& yes, const Lanes& no) {
  return each([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
}

#endif

inline Lanes load_some(const float* p, std::int64_t n) {  // zeros after the first n
  alignas(64) float part[16] = {};
  std::memcpy(part, p, n * sizeof(float));
  return load(part);
}
inline void store_some(float* p, Lanes a, std::int64_t n) {
  alignas(64) float part[16];
  store(part, a);
  std::memcpy(p, part, n * sizeof(float));
}
inline Lanes first(Lanes a, std::int64_t n) {  // the others zero
  alignas(64) float part[16];
  store(part, a);
  return load_some(part, n);
}
inline float sum(Lanes a) {  // halves onto halves
  alignas(64) float part[16];
  store(part, a);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}
inline float largest(Lanes a) {
  alignas(64) float part[16];
  store(part, a);
  for (int i = 1; i < 16; ++i)
    if (part[i] > part[0]) part[0] = part[i];
  return part[0];
}

// e^x by range reduction to |r| <= ln(2)/2 and the Taylor series up to r^7; below -87 as if -87, above 88 as if 88.
inline Lanes exponential(Lanes x) {
  x = smaller(larger(x, all(-87.0f)), all(88.0f));
  const Lanes n = nearest(x * all(1.44269504f));
  Lanes r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  Lanes p = all(1.0f / 5040);
  p = fma(p, r, all(1.0f / 720));
  p = fma(p, r, all(1.0f / 120));
  p = fma(p, r, all(1.0f / 24));
  p = fma(p, r, all(1.0f / 6));
  p = fma(p, r, all(0.5f));
  p = fma(p, r, all(1.0f));
  p = fma(p, r, all(1.0f));
  return p * power_of_two(n);
}

}  // namespace
