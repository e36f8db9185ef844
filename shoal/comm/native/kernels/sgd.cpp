// Stochastic gradient descent in one pass over memory, which writes the new weights to a second place on its way.
// The twin is torch.optim.SGD: it fuses each multiply with its add, and so do these loops, by name.
#include <cmath>
#include <cstdint>

#include "past_cache.hpp"
#include "vector.hpp"

namespace {
constexpr std::int64_t kRow = 1024;  // elements that go through all operations at once: they stay in the nearest cache

struct Options {
  double rate, decay, momentum, fresh;  // weights += rate * change; fresh: of a gradient in the momentum
  std::int32_t nesterov, first;         // first: there is no momentum yet
};

template <typename T>
inline __attribute__((always_inline)) void descend(T* __restrict weights, const T* __restrict gradient,
                                                   T* __restrict velocity, T* __restrict copy, std::int64_t elements,
                                                   const Options& options) {
  const T rate = T(options.rate), decay = T(options.decay), momentum = T(options.momentum), fresh = T(options.fresh);
  T change[kRow];
  for (std::int64_t from = 0; from < elements; from += kRow) {
    const std::int64_t count = elements - from < kRow ? elements - from : kRow;
    T* __restrict w = weights + from;
    const T* __restrict g = gradient + from;
    const T* step = g;  // of the gradient, the sum with the decay, the momentum: whatever the weights are to follow
    if (decay != T(0)) {
      for (std::int64_t i = 0; i < count; ++i) change[i] = std::fma(decay, w[i], g[i]);
      step = change;
    }
    if (velocity) {
      T* __restrict v = velocity + from;
      if (options.first)
        for (std::int64_t i = 0; i < count; ++i) v[i] = step[i];
      else
        for (std::int64_t i = 0; i < count; ++i) v[i] = std::fma(fresh, step[i], v[i] * momentum);
      if (options.nesterov)
        for (std::int64_t i = 0; i < count; ++i) change[i] = std::fma(momentum, v[i], step[i]);
      step = options.nesterov ? change : v;
    }
    for (std::int64_t i = 0; i < count; ++i) w[i] = std::fma(rate, step[i], w[i]);
    if (copy) copy_past_cache(copy + from, w, std::size_t(count) * sizeof(T));
  }
  past_cache_done();
}

SHOAL_VECTOR void descend_f32(float* w, const float* g, float* v, float* c, std::int64_t n, const Options& o) {
  descend<float>(w, g, v, c, n, o);
}
SHOAL_VECTOR void descend_f64(double* w, const double* g, double* v, double* c, std::int64_t n, const Options& o) {
  descend<double>(w, g, v, c, n, o);
}
}  // namespace

// velocity: null without momentum; copy: null, or where the new weights are written as well.
SHOAL_EXPORT void shoal_sgd_f32(float* weights, const float* gradient, float* velocity, float* copy,
                                std::int64_t elements, double rate, double decay, double momentum, double fresh,
                                std::int32_t nesterov, std::int32_t first) {
  descend_f32(weights, gradient, velocity, copy, elements, {rate, decay, momentum, fresh, nesterov, first});
}
SHOAL_EXPORT void shoal_sgd_f64(double* weights, const double* gradient, double* velocity, double* copy,
                                std::int64_t elements, double rate, double decay, double momentum, double fresh,
                                std::int32_t nesterov, std::int32_t first) {
  descend_f64(weights, gradient, velocity, copy, elements, {rate, decay, momentum, fresh, nesterov, first});
}
SHOAL_EXPORT void shoal_copy_past_cache(void* into, const void* from, std::int64_t bytes) {
  copy_past_cache(into, from, std::size_t(bytes));
  past_cache_done();
}
