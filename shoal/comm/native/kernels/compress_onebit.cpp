// Blocks of 2048 elements as one sign bit each and the mean magnitude. A block is 32 rows of 64 lanes: bit r of word l
// is the sign of element 64 r + l, so that a vector of words is filled by shifts alone. Payload: 64 words and the mean,
// block after block; the last block is padded with zeros.
#include "compress.hpp"

namespace {
using namespace shoal;

constexpr std::int64_t kLanes = 64, kRows = kBlock / kLanes;

struct Block {
  std::uint32_t signs[kLanes];
  float mean;
};
static_assert(sizeof(Block) == 4 * (kLanes + 1), "the payload's layout");

// values and error: whole blocks; count: the elements of the block that are not padding.
template <bool Feedback>
SHOAL_INLINE void compress_block(const float* __restrict gradient, float* __restrict error, Block* __restrict out,
                                 std::int64_t count) {
  float values[kBlock], sums[kLanes];
  std::uint32_t signs[kLanes];
  for (std::int64_t l = 0; l < kLanes; ++l) sums[l] = 0.0f, signs[l] = 0;
  for (std::int64_t r = 0; r < kRows; ++r) {
    for (std::int64_t l = 0; l < kLanes; ++l) {
      const float value = wanted<Feedback>(gradient, error, r * kLanes + l);
      values[r * kLanes + l] = value;
      sums[l] += float_of(bits_of(value) & kMagnitude);
      signs[l] |= (bits_of(value) >> 31) << r;
    }
  }
  for (std::int64_t half = kLanes / 2; half; half /= 2) {
    for (std::int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  float mean = sums[0] / static_cast<float>(count);
  const bool finite = bits_of(mean) < kInfinity;  // a mean has no sign
  mean = finite ? mean : float_of(kNan);
  std::memcpy(out->signs, signs, sizeof signs);
  out->mean = mean;
  if (!Feedback) return;
  if (!finite) {  // the block arrives as NaN, and no error outlives it
    std::memset(error, 0, kBlock * sizeof(float));
    return;
  }
  for (std::int64_t i = 0; i < kBlock; ++i) {
    error[i] = values[i] - float_of(bits_of(mean) | (bits_of(values[i]) & kSign));
  }
}

template <bool Feedback>
SHOAL_INLINE void compress(const float* gradient, float* error, std::uint8_t* payload, std::int64_t n) {
  auto* out = reinterpret_cast<Block*>(payload);
  const std::int64_t whole = n / kBlock, rest = n % kBlock;
  for (std::int64_t b = 0; b < whole; ++b) {
    compress_block<Feedback>(gradient + b * kBlock, Feedback ? error + b * kBlock : nullptr, out + b, kBlock);
  }
  if (!rest) return;
  float padded[kBlock] = {}, kept[kBlock] = {};
  std::memcpy(padded, gradient + whole * kBlock, static_cast<std::size_t>(rest) * sizeof(float));
  if (Feedback) std::memcpy(kept, error + whole * kBlock, static_cast<std::size_t>(rest) * sizeof(float));
  compress_block<Feedback>(padded, kept, out + whole, rest);
  if (Feedback) std::memcpy(error + whole * kBlock, kept, static_cast<std::size_t>(rest) * sizeof(float));
}

template <bool Add>
SHOAL_INLINE void decompress_block(const Block* __restrict block, float* __restrict out) {
  const std::uint32_t mean = bits_of(block->mean);
  for (std::int64_t r = 0; r < kRows; ++r) {
    for (std::int64_t l = 0; l < kLanes; ++l) {
      const float value = float_of(mean | ((block->signs[l] >> r) << 31));
      out[r * kLanes + l] = Add ? out[r * kLanes + l] + value : value;
    }
  }
}

template <bool Add>
SHOAL_INLINE void decompress(const std::uint8_t* payload, float* into, std::int64_t n) {
  const auto* blocks = reinterpret_cast<const Block*>(payload);
  const std::int64_t whole = n / kBlock, rest = n % kBlock;
  for (std::int64_t b = 0; b < whole; ++b) decompress_block<Add>(blocks + b, into + b * kBlock);
  if (!rest) return;
  float padded[kBlock] = {};
  if (Add) std::memcpy(padded, into + whole * kBlock, static_cast<std::size_t>(rest) * sizeof(float));
  decompress_block<Add>(blocks + whole, padded);
  std::memcpy(into + whole * kBlock, padded, static_cast<std::size_t>(rest) * sizeof(float));
}

SHOAL_VECTOR void fed(const float* g, float* e, std::uint8_t* p, std::int64_t n) { compress<true>(g, e, p, n); }
SHOAL_VECTOR void bare(const float* g, std::uint8_t* p, std::int64_t n) { compress<false>(g, nullptr, p, n); }
SHOAL_VECTOR void add(const std::uint8_t* p, float* into, std::int64_t n) { decompress<true>(p, into, n); }
SHOAL_VECTOR void restore(const std::uint8_t* p, float* into, std::int64_t n) { decompress<false>(p, into, n); }
}  // namespace

SHOAL_EXPORT void shoal_onebit_compress(const float* g, float* e, std::uint8_t* p, std::int64_t n) {
  e ? fed(g, e, p, n) : bare(g, p, n);
}
SHOAL_EXPORT void shoal_onebit_add(const std::uint8_t* p, float* into, std::int64_t n) { add(p, into, n); }
SHOAL_EXPORT void shoal_onebit_restore(const std::uint8_t* p, float* into, std::int64_t n) { restore(p, into, n); }
