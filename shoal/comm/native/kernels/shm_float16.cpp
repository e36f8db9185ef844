// x86 converts eight at once (F16C, in all 64-bit processors since 2013 or so); elsewhere loops of integer operations,
// which ARM's compilers turn into vectors.
#include "shm_float16.hpp"

#include "float16.hpp"
#include "vector.hpp"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SHOAL_F16C 1
#include <immintrin.h>
#endif

namespace shoal {

SHOAL_VECTOR void widen_f16_portable(float* __restrict out, const std::uint16_t* __restrict in, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) out[i] = f32_of_f16(in[i]);
}

SHOAL_VECTOR void narrow_f16_portable(std::uint16_t* __restrict out, const float* __restrict in, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) out[i] = f16_of_f32(in[i]);
}

#ifdef SHOAL_F16C
namespace {
__attribute__((target("avx,f16c"))) void widen_f16c(float* out, const std::uint16_t* in, std::size_t count) {
  std::size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
  for (; i < count; ++i) out[i] = f32_of_f16(in[i]);
}

__attribute__((target("avx,f16c"))) void narrow_f16c(std::uint16_t* out, const float* in, std::size_t count) {
  std::size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), eight);
  }
  for (; i < count; ++i) out[i] = f16_of_f32(in[i]);
}

bool has_f16c() { return __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c"); }
}  // namespace

void widen_f16(float* out, const std::uint16_t* in, std::size_t count) {
  has_f16c() ? widen_f16c(out, in, count) : widen_f16_portable(out, in, count);
}
void narrow_f16(std::uint16_t* out, const float* in, std::size_t count) {
  has_f16c() ? narrow_f16c(out, in, count) : narrow_f16_portable(out, in, count);
}
#else
void widen_f16(float* out, const std::uint16_t* in, std::size_t count) { widen_f16_portable(out, in, count); }
void narrow_f16(std::uint16_t* out, const float* in, std::size_t count) { narrow_f16_portable(out, in, count); }
#endif

}  // namespace shoal
