#include <cmath>
#include <cstdint>
#include <cstring>

#include "step.hpp"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,fma")
#define LANES_AVX512
#elif defined(__x86_64__) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,fma"))), apply_to = function)
#define LANES_AVX512
#endif

#ifdef LANES_AVX512
#include "lanes.hpp"
#include "step_body.hpp"
#ifdef __clang__
#pragma clang attribute pop
#endif
generation::Step generation::avx512_step() { return step; }
#else
generation::Step generation::avx512_step() { return nullptr; }
#endif
