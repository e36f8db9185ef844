// 16-bit floats, and the order and rounding of sums.
#pragma once

#include <cmath>

#include "shm_combine.hpp"
#include "shm_float16.hpp"
#include "shm_ranks.hpp"
#include "shm_values.hpp"

using namespace shoal;

// By the definition of the format: sign, exponent, fraction.
inline double f16_value(std::uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return half & 0x8000 ? -size : size;
}

inline bool is_nan16(std::uint16_t half) { return (half & 0x7fff) > 0x7c00; }

inline void every_half_becomes_its_value_and_comes_back() {
  std::vector<std::uint16_t> all(65536), back(65536);
  for (int i = 0; i < 65536; ++i) all[i] = static_cast<std::uint16_t>(i);
  std::vector<float> wide(65536), portable(65536);
  widen_f16(wide.data(), all.data(), all.size());
  widen_f16_portable(portable.data(), all.data(), all.size());
  for (int i = 0; i < 65536; ++i) {
    if (is_nan16(all[i])) {
      CLAIM(std::isnan(wide[i]) && std::isnan(portable[i]), "%04x", i);
      continue;
    }
    CLAIM(bits_of(wide[i]) == bits_of(portable[i]), "%04x: %a, %a", i, wide[i], portable[i]);
    if ((i & 0x7fff) == 0x7c00) CLAIM(std::isinf(wide[i]), "%04x", i);
    else CLAIM(wide[i] == f16_value(all[i]), "%04x: %a", i, wide[i]);
  }
  narrow_f16(back.data(), wide.data(), wide.size());
  for (int i = 0; i < 65536; ++i) CLAIM(back[i] == all[i] || (is_nan16(all[i]) && is_nan16(back[i])), "%04x", i);
}

// Every f32 whose low bits are one of those where rounding decides, against the nearest half found by comparison.
inline void narrowing_takes_the_nearest_half_and_ties_to_even() {
  std::vector<float> wide;
  for (std::uint32_t high = 0; high < 0x8000; ++high) {
    for (std::uint32_t low : {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x3000u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      wide.push_back(float_of(high << 16 | low));
    }
  }
  std::vector<std::uint16_t> half(wide.size()), portable(wide.size());
  narrow_f16(half.data(), wide.data(), wide.size());
  narrow_f16_portable(portable.data(), wide.data(), wide.size());
  for (std::size_t i = 0; i < wide.size(); ++i) {
    CLAIM(half[i] == portable[i], "%a: %04x, %04x", wide[i], half[i], portable[i]);
    if (std::isnan(wide[i])) {
      CLAIM(is_nan16(half[i]) && (bf16_of_f32(wide[i]) & 0x7fff) > 0x7f80, "%a is no longer NaN", wide[i]);
      continue;
    }
    const double x = wide[i];
    if (x >= 65520) {
      CLAIM(half[i] == 0x7c00, "%a: %04x", x, half[i]);
    } else {
      const double here = std::fabs(f16_value(half[i]) - x);
      const double above = std::fabs((half[i] == 0x7bff ? 65536 : f16_value(half[i] + 1)) - x);
      const double below = half[i] ? std::fabs(f16_value(half[i] - 1) - x) : 1e9;
      CLAIM(here <= above && here <= below, "%a: %04x", x, half[i]);
      CLAIM((here < above && here < below) || half[i] % 2 == 0, "tie %a: %04x", x, half[i]);
    }
    if (std::isinf(wide[i])) continue;
    const std::uint16_t brain = bf16_of_f32(wide[i]);
    const double size = std::fabs(static_cast<double>(f32_of_bf16(brain)) - x);
    if (brain >= 0x7f7f) continue;  // next to infinite: its distance has no value
    const double up = std::fabs(static_cast<double>(f32_of_bf16(brain + 1)) - x);
    const double down = brain ? std::fabs(static_cast<double>(f32_of_bf16(brain - 1)) - x) : 1e99;
    CLAIM(size <= up && size <= down, "%a: %04x", x, brain);
    CLAIM((size < up && size < down) || brain % 2 == 0, "tie %a: %04x", x, brain);
  }
}

template <typename T>
std::vector<T> combined(DType dtype, ReduceOp op, const std::vector<std::vector<T>>& ins) {
  std::vector<const void*> from;
  for (const auto& in : ins) from.push_back(in.data());
  std::vector<T> out(ins[0].size()), second(ins[0].size());
  void* outs[2] = {out.data(), second.data()};
  combine(dtype, op, outs, 2, from.data(), static_cast<int>(from.size()), out.size());
  CLAIM(std::memcmp(out.data(), second.data(), out.size() * sizeof(T)) == 0, "two copies differ");
  return out;
}

inline void sums_go_by_the_order_of_ranks_and_round_once() {
  const float big = 1e8f;
  for (int ranks = 3; ranks <= 6; ++ranks) {
    std::vector<std::vector<float>> ins(ranks, std::vector<float>(37, 1.0f));
    ins[0].assign(37, big);
    ins[ranks - 1].assign(37, -big);
    float expected = big;
    for (int r = 1; r < ranks; ++r) expected += ins[r][0];  // 0: each 1 is lost beside 1e8; another order keeps it
    for (float x : combined(DType::f32, ReduceOp::sum, ins)) CLAIM(x == expected, "%a, not %a", x, expected);
    CLAIM(expected == 0, "%a", expected);
  }
  // In 16 bits each 1 would be lost beside 256 (bfloat16) or 2048 (float16).
  const std::vector<std::vector<std::uint16_t>> brain{{bf16_of_f32(256)}, {bf16_of_f32(1)}, {bf16_of_f32(1)}};
  CLAIM(f32_of_bf16(combined(DType::bf16, ReduceOp::sum, brain)[0]) == 258, "bfloat16 was rounded in between");
  const std::vector<std::vector<std::uint16_t>> half{{f16_of_f32(2048)}, {f16_of_f32(1)}, {f16_of_f32(1)}};
  CLAIM(f32_of_f16(combined(DType::f16, ReduceOp::sum, half)[0]) == 2050, "float16 was rounded in between");
  CLAIM(f32_of_bf16(combined(DType::bf16, ReduceOp::avg, brain)[0]) == 86, "the average is not the sum, divided");
}

inline void a_nan_wins_from_whichever_rank() {
  const float nan = std::nanf("");
  for (ReduceOp op : {ReduceOp::min, ReduceOp::max, ReduceOp::sum}) {
    for (int where = 0; where < 3; ++where) {
      std::vector<std::vector<float>> ins(3, std::vector<float>(9, 1.0f));
      ins[where].assign(9, nan);
      for (float x : combined(DType::f32, op, ins)) CLAIM(std::isnan(x), "%s lost it", name_of(op));
      std::vector<std::vector<std::uint16_t>> brain(3, std::vector<std::uint16_t>(9, bf16_of_f32(1)));
      brain[where].assign(9, 0x7fff);  // all ones: rounding must not carry it over into a number
      for (std::uint16_t x : combined(DType::bf16, op, brain)) {
        CLAIM(std::isnan(f32_of_bf16(x)), "%s lost it", name_of(op));
      }
    }
  }
}

inline void whole_numbers_wrap_around() {
  const std::vector<std::vector<std::int8_t>> small{{127, -128}, {1, -1}};
  CLAIM((combined(DType::i8, ReduceOp::sum, small) == std::vector<std::int8_t>{-128, 127}), "int8");
  const std::vector<std::vector<std::int64_t>> large{{INT64_MAX, INT64_MAX}, {1, 2}};
  CLAIM((combined(DType::i64, ReduceOp::sum, large)[0] == INT64_MIN), "int64");
  CLAIM((combined(DType::i64, ReduceOp::product, large)[1] == -2), "int64");
  const std::vector<std::vector<std::uint16_t>> squares{{65535}, {65535}};
  CLAIM((combined(DType::u16, ReduceOp::product, squares)[0] == 1), "uint16");
}

inline void test_numbers() {
  every_half_becomes_its_value_and_comes_back();
  narrowing_takes_the_nearest_half_and_ties_to_even();
  sums_go_by_the_order_of_ranks_and_round_once();
  a_nan_wins_from_whichever_rank();
  whole_numbers_wrap_around();
}
