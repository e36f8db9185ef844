// Plain loops over blocks that stay in a core's first cache; the compiler makes vectors of them for each machine.
#include "shm_combine.hpp"

#include <cstring>
#include <type_traits>

#include "float16.hpp"
#include "shm_float16.hpp"
#include "vector.hpp"

namespace shoal {
namespace {

struct Operands {
  void* const* outs;
  int out_count;
  const void* const* ins;
  int in_count;
  std::size_t count;
};

// What an element is in memory, and what it is while it is combined.
template <typename T>
struct Plain {
  using Stored = T;
  using Wide = T;
  static SHOAL_INLINE T load(T x) { return x; }
  static SHOAL_INLINE T store(T x) { return x; }
};
struct BFloat16 {
  using Stored = std::uint16_t;
  using Wide = float;
  static SHOAL_INLINE float load(std::uint16_t x) { return f32_of_bf16(x); }
  static SHOAL_INLINE std::uint16_t store(float x) { return bf16_of_f32(x); }
};
template <typename T>
struct Complex {
  T re, im;
};

// Whole numbers wrap around, which signed types may not: unsigned, and no narrower than int.
template <typename T>
using Wrapping = std::common_type_t<std::make_unsigned_t<T>, unsigned>;

struct Plus {
  template <typename T>
  static SHOAL_INLINE T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(static_cast<Wrapping<T>>(a) + static_cast<Wrapping<T>>(b));
    } else {
      return a + b;
    }
  }
};
struct Times {
  template <typename T>
  static SHOAL_INLINE T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(static_cast<Wrapping<T>>(a) * static_cast<Wrapping<T>>(b));
    } else {
      return a * b;
    }
  }
  template <typename T>
  static SHOAL_INLINE Complex<T> of(Complex<T> a, Complex<T> b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
  }
};
// A NaN wins, on whichever side: the result must not depend on the order.
struct Least {
  template <typename T>
  static SHOAL_INLINE T of(T a, T b) {
    return (a < b) | (a != a) ? a : b;
  }
};
struct Most {
  template <typename T>
  static SHOAL_INLINE T of(T a, T b) {
    return (a > b) | (a != a) ? a : b;
  }
};
struct And {
  template <typename T>
  static SHOAL_INLINE T of(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <typename T>
  static SHOAL_INLINE T of(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <typename T>
  static SHOAL_INLINE T of(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};

constexpr std::size_t kBlockBytes = 4096;

// Any number of inputs and outputs: a block is accumulated aside, then written to each output.
template <typename E, typename F, bool kAverage>
SHOAL_INLINE void blocks(const Operands& o) {
  using Stored = typename E::Stored;
  using Wide = typename E::Wide;
  constexpr std::size_t kBlock = kBlockBytes / sizeof(Wide);
  alignas(64) Wide sum[kBlock];
  for (std::size_t start = 0; start < o.count; start += kBlock) {
    const std::size_t n = o.count - start < kBlock ? o.count - start : kBlock;
    const Stored* first = static_cast<const Stored*>(o.ins[0]) + start;
    if (o.in_count == 1) {
      for (std::size_t i = 0; i < n; ++i) sum[i] = E::load(first[i]);
    } else {
      const Stored* second = static_cast<const Stored*>(o.ins[1]) + start;
      for (std::size_t i = 0; i < n; ++i) sum[i] = F::of(E::load(first[i]), E::load(second[i]));
    }
    for (int s = 2; s < o.in_count; ++s) {
      const Stored* next = static_cast<const Stored*>(o.ins[s]) + start;
      for (std::size_t i = 0; i < n; ++i) sum[i] = F::of(sum[i], E::load(next[i]));
    }
    if constexpr (kAverage) {
      const Wide by = static_cast<Wide>(o.in_count);
      for (std::size_t i = 0; i < n; ++i) sum[i] /= by;
    }
    Stored* out = static_cast<Stored*>(o.outs[0]) + start;
    for (std::size_t i = 0; i < n; ++i) out[i] = E::store(sum[i]);
    for (int d = 1; d < o.out_count; ++d) std::memcpy(static_cast<Stored*>(o.outs[d]) + start, out, n * sizeof(Stored));
  }
}

// The same for f16, which few compilers turn into the machine's own conversions: those take a block at a time.
template <typename F, bool kAverage>
SHOAL_INLINE void half_blocks(const Operands& o) {
  constexpr std::size_t kBlock = kBlockBytes / sizeof(float);
  alignas(64) float sum[kBlock], next[kBlock];
  for (std::size_t start = 0; start < o.count; start += kBlock) {
    const std::size_t n = o.count - start < kBlock ? o.count - start : kBlock;
    widen_f16(sum, static_cast<const std::uint16_t*>(o.ins[0]) + start, n);
    for (int s = 1; s < o.in_count; ++s) {
      widen_f16(next, static_cast<const std::uint16_t*>(o.ins[s]) + start, n);
      for (std::size_t i = 0; i < n; ++i) sum[i] = F::of(sum[i], next[i]);
    }
    if constexpr (kAverage) {
      const float by = static_cast<float>(o.in_count);
      for (std::size_t i = 0; i < n; ++i) sum[i] /= by;
    }
    std::uint16_t* out = static_cast<std::uint16_t*>(o.outs[0]) + start;
    narrow_f16(out, sum, n);
    for (int d = 1; d < o.out_count; ++d) std::memcpy(static_cast<std::uint16_t*>(o.outs[d]) + start, out, 2 * n);
  }
}

// The hot shapes (sums of two to four, to one or two places) in registers. Outputs may be inputs, element for element,
// which is no dependency between elements: hence ivdep.
template <typename E, int kIns, int kOuts>
SHOAL_INLINE void sums(const Operands& o) {
  using Stored = typename E::Stored;
  const Stored* a = static_cast<const Stored*>(o.ins[0]);
  const Stored* b = static_cast<const Stored*>(o.ins[1]);
  const Stored* c = static_cast<const Stored*>(o.ins[kIns > 2 ? 2 : 0]);
  const Stored* d = static_cast<const Stored*>(o.ins[kIns > 3 ? 3 : 0]);
  Stored* x = static_cast<Stored*>(o.outs[0]);
  Stored* y = static_cast<Stored*>(o.outs[kOuts > 1 ? 1 : 0]);
#pragma GCC ivdep
  for (std::size_t i = 0; i < o.count; ++i) {
    auto sum = Plus::of(E::load(a[i]), E::load(b[i]));
    if constexpr (kIns > 2) sum = Plus::of(sum, E::load(c[i]));
    if constexpr (kIns > 3) sum = Plus::of(sum, E::load(d[i]));
    x[i] = E::store(sum);
    if constexpr (kOuts > 1) y[i] = E::store(sum);
  }
}

template <typename E>
SHOAL_INLINE void plus(const Operands& o) {
  if (o.in_count == 2 && o.out_count == 1) return sums<E, 2, 1>(o);
  if (o.in_count == 2 && o.out_count == 2) return sums<E, 2, 2>(o);
  if (o.in_count == 3 && o.out_count == 1) return sums<E, 3, 1>(o);
  if (o.in_count == 4 && o.out_count == 1) return sums<E, 4, 1>(o);
  blocks<E, Plus, false>(o);
}

template <typename E>
SHOAL_INLINE void floating(ReduceOp op, const Operands& o) {
  switch (op) {
    case ReduceOp::sum: return plus<E>(o);
    case ReduceOp::avg: return blocks<E, Plus, true>(o);
    case ReduceOp::product: return blocks<E, Times, false>(o);
    case ReduceOp::min: return blocks<E, Least, false>(o);
    case ReduceOp::max: return blocks<E, Most, false>(o);
    default: return;
  }
}

SHOAL_INLINE void halves(ReduceOp op, const Operands& o) {
  switch (op) {
    case ReduceOp::sum: return half_blocks<Plus, false>(o);
    case ReduceOp::avg: return half_blocks<Plus, true>(o);
    case ReduceOp::product: return half_blocks<Times, false>(o);
    case ReduceOp::min: return half_blocks<Least, false>(o);
    case ReduceOp::max: return half_blocks<Most, false>(o);
    default: return;
  }
}

template <typename T>
SHOAL_INLINE void whole(ReduceOp op, const Operands& o) {
  using E = Plain<T>;
  switch (op) {
    case ReduceOp::sum: return blocks<E, Plus, false>(o);
    case ReduceOp::product: return blocks<E, Times, false>(o);
    case ReduceOp::min: return blocks<E, Least, false>(o);
    case ReduceOp::max: return blocks<E, Most, false>(o);
    case ReduceOp::band: return blocks<E, And, false>(o);
    case ReduceOp::bor: return blocks<E, Or, false>(o);
    case ReduceOp::bxor: return blocks<E, Xor, false>(o);
    default: return;
  }
}

SHOAL_VECTOR void combine_f32(ReduceOp op, const Operands& o) { floating<Plain<float>>(op, o); }
SHOAL_VECTOR void combine_f64(ReduceOp op, const Operands& o) { floating<Plain<double>>(op, o); }
SHOAL_VECTOR void combine_f16(ReduceOp op, const Operands& o) { halves(op, o); }
SHOAL_VECTOR void combine_bf16(ReduceOp op, const Operands& o) { floating<BFloat16>(op, o); }
SHOAL_VECTOR void combine_i32(ReduceOp op, const Operands& o) { whole<std::int32_t>(op, o); }
SHOAL_VECTOR void combine_i64(ReduceOp op, const Operands& o) { whole<std::int64_t>(op, o); }

// Bytes other than 0 and 1 could not come from a bool; OR and AND keep them what they are.
void combine_boolean(ReduceOp op, const Operands& o) {
  const bool all = op == ReduceOp::product || op == ReduceOp::min || op == ReduceOp::band;
  whole<std::uint8_t>(op == ReduceOp::bxor ? op : all ? ReduceOp::band : ReduceOp::bor, o);
}

template <typename T>
void complex(void (*parts)(ReduceOp, const Operands&), ReduceOp op, Operands o) {
  if (op == ReduceOp::product) return blocks<Plain<Complex<T>>, Times, false>(o);
  o.count *= 2;  // sums go part by part
  parts(op, o);
}

}  // namespace

void combine(DType dtype, ReduceOp op, void* const* outs, int out_count, const void* const* ins, int in_count,
             std::size_t count) {
  const Operands o{outs, out_count, ins, in_count, count};
  switch (dtype) {
    case DType::f32: return combine_f32(op, o);
    case DType::f64: return combine_f64(op, o);
    case DType::f16: return combine_f16(op, o);
    case DType::bf16: return combine_bf16(op, o);
    case DType::i8: return whole<std::int8_t>(op, o);
    case DType::u8: return whole<std::uint8_t>(op, o);
    case DType::i16: return whole<std::int16_t>(op, o);
    case DType::u16: return whole<std::uint16_t>(op, o);
    case DType::i32: return combine_i32(op, o);
    case DType::u32: return whole<std::uint32_t>(op, o);
    case DType::i64: return combine_i64(op, o);
    case DType::u64: return whole<std::uint64_t>(op, o);
    case DType::boolean: return combine_boolean(op, o);
    case DType::c64: return complex<float>(combine_f32, op, o);
    case DType::c128: return complex<double>(combine_f64, op, o);
    case DType::f8:
    case DType::raw: return;
  }
}

}  // namespace shoal
