// The elements of largest magnitude, as (index, value), in one pass: the threshold is estimated from a sample first.
// Payload: the number of entries, then room for `room` indices (uint32, ascending) and as many values (float32); unused
// room is zero. See shoal/comm/compression/topk.py for the rule.
#include <algorithm>

#include "compress.hpp"

namespace {
using namespace shoal;

constexpr std::int64_t kMostSamples = 16384;
constexpr std::uint32_t kGolden = 2654435769u;  // 2^32 / the golden ratio: scatters the samples within their strides

struct Entries {
  std::uint64_t* count;
  std::uint32_t* indices;
  float* values;
};

SHOAL_INLINE Entries entries(std::uint8_t* body, std::int64_t room) {
  return {reinterpret_cast<std::uint64_t*>(body), reinterpret_cast<std::uint32_t*>(body + 8),
          reinterpret_cast<float*>(body + 8 + 4 * room)};
}

template <bool Feedback>
std::uint32_t threshold(const float* gradient, const float* error, std::int64_t samples, std::int64_t stride,
                        std::int64_t above) {
  std::uint32_t magnitudes[kMostSamples];
  for (std::int64_t s = 0; s < samples; ++s) {
    const std::uint64_t within = static_cast<std::uint64_t>(static_cast<std::uint32_t>(s) * kGolden) *
                                 static_cast<std::uint64_t>(stride) >> 32;
    magnitudes[s] = bits_of(wanted<Feedback>(gradient, error, s * stride + static_cast<std::int64_t>(within))) & kMagnitude;
  }
  std::nth_element(magnitudes, magnitudes + (above - 1), magnitudes + samples, [](auto a, auto b) { return a > b; });
  return std::max(magnitudes[above - 1], 1u);  // zeros are never worth sending
}

struct Found {
  std::int64_t count;
  bool lost;  // a number that is not finite found no room
};

template <bool Feedback>
SHOAL_INLINE void select_block(const float* __restrict gradient, float* __restrict error, std::int64_t start,
                               std::int64_t count, std::uint32_t at_least, std::int64_t room, Entries out, Found& found) {
  float values[kBlock];
  alignas(8) std::uint8_t chosen[kBlock];
  std::uint32_t strange = 0;
  const auto floor = static_cast<std::int32_t>(at_least);
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = wanted<Feedback>(gradient, error, start + i);
    const auto magnitude = static_cast<std::int32_t>(bits_of(value) & kMagnitude);
    values[i] = value;
    chosen[i] = magnitude >= floor ? 1 : 0;
    strange |= magnitude >= static_cast<std::int32_t>(kInfinity) ? 1u : 0u;
    if (Feedback) error[start + i] = value;
  }
  for (std::int64_t i = count; i < ((count + 7) & ~std::int64_t{7}); ++i) chosen[i] = 0;
  for (std::int64_t i = 0; i < count && found.count < room; i += 8) {
    std::uint64_t eight;
    std::memcpy(&eight, chosen + i, sizeof eight);
    if (!eight) continue;
    for (std::int64_t j = i; j < i + 8 && found.count < room; ++j) {
      if (!chosen[j]) continue;
      out.indices[found.count] = static_cast<std::uint32_t>(start + j);
      out.values[found.count++] = values[j] == values[j] ? values[j] : float_of(kNan);
      chosen[j] = 2;
      if (Feedback) error[start + j] = 0.0f;
    }
  }
  if (!strange) return;
  for (std::int64_t i = 0; i < count; ++i) {
    if ((bits_of(values[i]) & kMagnitude) < kInfinity || chosen[i] == 2) continue;
    found.lost = true;
    if (Feedback) error[start + i] = 0.0f;
  }
}

template <bool Feedback>
SHOAL_INLINE void select_all(const float* gradient, float* error, std::int64_t n, std::uint32_t at_least,
                             std::int64_t room, Entries out, Found& found) {
  for (std::int64_t start = 0; start < n; start += kBlock) {
    select_block<Feedback>(gradient, error, start, n - start < kBlock ? n - start : kBlock, at_least, room, out, found);
  }
}

SHOAL_VECTOR void fed(const float* g, float* e, std::int64_t n, std::uint32_t t, std::int64_t room, Entries out,
                      Found* found) {
  select_all<true>(g, e, n, t, room, out, *found);
}
SHOAL_VECTOR void bare(const float* g, std::int64_t n, std::uint32_t t, std::int64_t room, Entries out, Found* found) {
  select_all<false>(g, nullptr, n, t, room, out, *found);
}
}  // namespace

// 0, or -1 for a sample or a size that cannot be.
SHOAL_EXPORT std::int32_t shoal_topk_compress(const float* g, float* e, std::uint8_t* body, std::int64_t n,
                                              std::int64_t room, std::int64_t samples, std::int64_t stride,
                                              std::int64_t above) {
  if (n < 0 || n > std::int64_t{UINT32_MAX} || room > n || samples > kMostSamples || samples * stride > n ||
      (n && (room < 1 || above < 1 || above > samples))) {
    return -1;
  }
  const Entries out = entries(body, room);
  Found found{0, false};
  if (n) {
    const std::uint32_t at_least =
        e ? threshold<true>(g, e, samples, stride, above) : threshold<false>(g, e, samples, stride, above);
    e ? fed(g, e, n, at_least, room, out, &found) : bare(g, n, at_least, room, out, &found);
    if (found.lost) out.values[room - 1] = float_of(kNan);  // the room is full, or nothing would have been lost
  }
  std::memset(out.indices + found.count, 0, static_cast<std::size_t>(room - found.count) * 4);
  std::memset(out.values + found.count, 0, static_cast<std::size_t>(room - found.count) * 4);
  *out.count = static_cast<std::uint64_t>(found.count);
  return 0;
}

// 0, or -1 where the entries are more than there is room for, not ascending, or beyond n: then nothing is written.
SHOAL_EXPORT std::int32_t shoal_topk_add(const std::uint8_t* body, float* into, std::int64_t n, std::int64_t room) {
  const Entries in = entries(const_cast<std::uint8_t*>(body), room);
  if (*in.count > static_cast<std::uint64_t>(room)) return -1;
  const auto count = static_cast<std::int64_t>(*in.count);
  for (std::int64_t i = 0; i < count; ++i) {
    if (in.indices[i] >= n || (i && in.indices[i] <= in.indices[i - 1])) return -1;
  }
  for (std::int64_t i = 0; i < count; ++i) into[in.indices[i]] += in.values[i];
  return 0;
}
