// Whole numbers in every dtype: sums of them are exact, so results are compared for equality.
#pragma once

#include <cstdint>
#include <cstring>

#include "float16.hpp"
#include "shm_types.hpp"

using shoal::DType;
using shoal::ReduceOp;

// Real part; an imaginary one is the number plus one.
inline void put(DType dtype, void* to, std::size_t index, std::int64_t number) {
  const auto as = [&](auto value) { std::memcpy(static_cast<char*>(to) + index * sizeof value, &value, sizeof value); };
  switch (dtype) {
    case DType::f32: return as(static_cast<float>(number));
    case DType::f64: return as(static_cast<double>(number));
    case DType::f16: return as(shoal::f16_of_f32(static_cast<float>(number)));
    case DType::bf16: return as(shoal::bf16_of_f32(static_cast<float>(number)));
    case DType::i8: case DType::u8: case DType::f8: case DType::raw: return as(static_cast<std::uint8_t>(number));
    case DType::boolean: return as(static_cast<std::uint8_t>(number != 0));
    case DType::i16: case DType::u16: return as(static_cast<std::uint16_t>(number));
    case DType::i32: case DType::u32: return as(static_cast<std::uint32_t>(number));
    case DType::i64: case DType::u64: return as(static_cast<std::uint64_t>(number));
    case DType::c64: {
      struct { float re, im; } value{static_cast<float>(number), static_cast<float>(number + 1)};
      return as(value);
    }
    case DType::c128: {
      struct { double re, im; } value{static_cast<double>(number), static_cast<double>(number + 1)};
      return as(value);
    }
  }
}

// A number of rank `rank`: small, so that nine of them add up exactly in bfloat16; positive, as in unsigned types.
inline std::int64_t number_of(int rank, std::size_t index, ReduceOp op) {
  const std::uint64_t mixed = (index * 2654435761u + static_cast<std::uint64_t>(rank) * 40503u) >> 7;
  return op == ReduceOp::product ? 1 + static_cast<std::int64_t>(mixed % 2) : static_cast<std::int64_t>(mixed % 13);
}

struct Expected {
  std::int64_t re, im;
};

// What the ranks' numbers come to, by another way of adding up: one number at a time, whole.
inline Expected expected_of(DType dtype, ReduceOp op, int world, std::size_t index) {
  const bool complex = dtype == DType::c64 || dtype == DType::c128;
  Expected total{};
  for (int rank = 0; rank < world; ++rank) {
    std::int64_t x = number_of(rank, index, op);
    if (dtype == DType::boolean) x = x != 0;
    const std::int64_t y = x + 1;
    if (rank == 0) {
      total = {x, y};
      continue;
    }
    switch (op) {
      case ReduceOp::sum: case ReduceOp::avg:
        total = dtype == DType::boolean ? Expected{total.re | x, 0} : Expected{total.re + x, total.im + y};
        break;
      case ReduceOp::product:
        total = {complex ? total.re * x - total.im * y : total.re * x, complex ? total.re * y + total.im * x : 0};
        break;
      case ReduceOp::min: total.re = x < total.re ? x : total.re; break;
      case ReduceOp::max: total.re = x > total.re ? x : total.re; break;
      case ReduceOp::band: total.re &= x; break;
      case ReduceOp::bor: total.re |= x; break;
      case ReduceOp::bxor: total.re ^= x; break;
    }
  }
  return total;
}

inline void put_expected(DType dtype, ReduceOp op, int world, void* to, std::size_t index) {
  const Expected e = expected_of(dtype, op, world, index);
  char* at = static_cast<char*>(to) + index * shoal::size_of(dtype);
  if (op == ReduceOp::avg) {
    const float single = static_cast<float>(e.re) / static_cast<float>(world);
    const std::uint16_t half = dtype == DType::f16 ? shoal::f16_of_f32(single) : shoal::bf16_of_f32(single);
    const double twice[2] = {static_cast<double>(e.re) / world, static_cast<double>(e.im) / world};
    const float once[2] = {single, static_cast<float>(e.im) / static_cast<float>(world)};
    const bool is_double = dtype == DType::f64 || dtype == DType::c128;
    const void* from = once;
    if (is_double) from = twice;
    if (shoal::size_of(dtype) == 2) from = &half;
    std::memcpy(at, from, shoal::size_of(dtype));
  } else if (dtype == DType::c64) {
    const float parts[2] = {static_cast<float>(e.re), static_cast<float>(e.im)};
    std::memcpy(static_cast<char*>(to) + index * sizeof parts, parts, sizeof parts);
  } else if (dtype == DType::c128) {
    const double parts[2] = {static_cast<double>(e.re), static_cast<double>(e.im)};
    std::memcpy(static_cast<char*>(to) + index * sizeof parts, parts, sizeof parts);
  } else {
    put(dtype, to, index, e.re);
  }
}
