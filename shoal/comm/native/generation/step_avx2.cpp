#include <cmath>
#include <cstdint>
#include <cstring>

#include "step.hpp"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define LANES_AVX2
#elif defined(__x86_64__) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#define LANES_AVX2
#endif

#ifdef LANES_AVX2
#include "lanes.hpp"
#include "step_body.hpp"
#ifdef __clang__
#pragma clang attribute pop
#endif
generation::Step generation::avx2_step() { return step; }
#else
generation::Step generation::avx2_step() { return nullptr; }
#endif
