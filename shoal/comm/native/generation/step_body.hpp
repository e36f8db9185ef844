// The step of step.hpp over one instruction set: included once by each file that sets LANES_*, inside its target.

namespace {
using namespace generation;

#ifdef LANES_AVX512
constexpr std::int64_t kTile = 8;  // rows that go through a panel at once: as many as the registers hold sums of
#else
constexpr std::int64_t kTile = 2;
#endif
constexpr std::int64_t kAhead = 48;  // inputs: how far ahead of its use a panel is fetched; 16 and 128 were slower

// ---- rows times a packed weight: [rows, in] x [in, out]

enum class After { kStore, kAdd, kActivate };

inline Lanes gelu(Lanes x) {
  const Lanes scaled = x * all(0.707106781f);
  const Lanes z = smaller(larger(scaled, all(0.0f) - scaled), all(4.0f)), t = z * z;
  // erf(z) / z in z^2 on [0, 1], and ln erfc(z) on [1, 4]: Chebyshev interpolations, absolute error of erf below 1e-7
  constexpr float near[] = {1.12837923f,     -0.376126379f,    0.112837821f,    -0.0268654302f,
                            0.00522103161f,  -0.000848408032f, 0.000112659589f, -9.66704374e-06f};
  constexpr float far[] = {0.00032013806f,  -1.13023341f,    -0.631826043f,   -0.110080086f,   0.0264211353f,
                           -0.0047595962f,  0.00059680565f,  -4.6058045e-05f, 1.6371514e-06f};
  Lanes low = all(near[7]), high = all(far[8]);
  for (int i = 6; i >= 0; --i) low = fma(low, t, all(near[i]));
  for (int i = 7; i >= 0; --i) high = fma(high, z, all(far[i]));
  const Lanes half = all(0.5f), one = all(1.0f), part = half * (z * low), tail = half * exponential(high);
  const Lanes inner = where_less(x, all(0.0f), half - part, half + part);
  const Lanes outer = where_less(x, all(0.0f), tail, one - tail);
  return x * where_less(z, one, inner, outer);
}

inline Lanes gelu_by_tanh(Lanes x) {  // x (1 + tanh u) / 2 = x / (1 + e^-2u)
  const Lanes u = all(0.797884561f) * fma(all(0.044715f) * x * x, x, x);
  return x / (all(1.0f) + exponential(all(-2.0f) * u));
}

inline Lanes activated(Lanes x, std::int64_t which) {
  return which == 0 ? gelu(x) : which == 1 ? gelu_by_tanh(x) : larger(x, all(0.0f));
}

struct Out {
  float* to;
  std::int64_t stride;
  std::int64_t width;  // of a whole row
  const float* bias;
  After after;
  std::int64_t activation;
};

inline void write(const Out& out, std::int64_t row, std::int64_t column, Lanes sum) {
  const std::int64_t left = out.width - column;
  if (left <= 0) return;
  float* to = out.to + row * out.stride + column;
  const bool whole = left >= 16;
  if (out.bias) sum = sum + (whole ? load(out.bias + column) : load_some(out.bias + column, left));
  if (out.after == After::kAdd) sum = (whole ? load(to) : load_some(to, left)) + sum;
  if (out.after == After::kActivate) sum = activated(sum, out.activation);
  if (whole)
    store(to, sum);
  else
    store_some(to, sum, left);
}

template <int kRows, typename W>
inline void through_panel(const float* const* rows, const W* panel, std::int64_t in, const Out& out, std::int64_t row,
                          std::int64_t column) {
  const bool fetch = row == 0;  // later tiles find the panel in the cache
  Lanes sums[kRows][3];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 3; ++v) sums[r][v] = all(0.0f);
  for (std::int64_t k = 0; k < in; ++k, panel += kPanel) {
    if (fetch)
      for (std::int64_t line = 0; line < kPanel; line += 64 / std::int64_t(sizeof(W)))
        __builtin_prefetch(panel + kAhead * kPanel + line);
    const Lanes w0 = load(panel), w1 = load(panel + 16), w2 = load(panel + 32);
    for (int r = 0; r < kRows; ++r) {
      const Lanes x = all(rows[r][k]);
      sums[r][0] = fma(x, w0, sums[r][0]);
      sums[r][1] = fma(x, w1, sums[r][1]);
      sums[r][2] = fma(x, w2, sums[r][2]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 3; ++v) write(out, row + r, column + 16 * v, sums[r][v]);
}

template <typename W>
void panels(const float* x, std::int64_t stride, const std::int64_t* picked, std::int64_t rows, const W* weight,
            std::int64_t in, const Out& out, const Share& share) {
  const std::int64_t count = (out.width + kPanel - 1) / kPanel, tiles = (rows + kTile - 1) / kTile;
  for (std::int64_t p = count * share.index / share.count; p < count * (share.index + 1) / share.count; ++p) {
    const W* panel = weight + p * in * kPanel;
    for (std::int64_t t = 0; t < tiles; ++t) {  // tiles of even size: a tile of one row is slow
      const std::int64_t from = rows * t / tiles, size = rows * (t + 1) / tiles - from;
      const float* at[kTile];
      for (std::int64_t r = 0; r < size; ++r) at[r] = x + (picked ? picked[from + r] : from + r) * stride;
      switch (size) {
        case 1: through_panel<1>(at, panel, in, out, from, p * kPanel); break;
        case 2: through_panel<2>(at, panel, in, out, from, p * kPanel); break;
#ifdef LANES_AVX512
        case 3: through_panel<3>(at, panel, in, out, from, p * kPanel); break;
        case 4: through_panel<4>(at, panel, in, out, from, p * kPanel); break;
        case 5: through_panel<5>(at, panel, in, out, from, p * kPanel); break;
        case 6: through_panel<6>(at, panel, in, out, from, p * kPanel); break;
        case 7: through_panel<7>(at, panel, in, out, from, p * kPanel); break;
        case 8: through_panel<8>(at, panel, in, out, from, p * kPanel); break;
#endif
      }
    }
  }
}

void multiply(const Shape& shape, const float* x, std::int64_t in, const std::int64_t* picked, std::int64_t rows,
              const void* weight, const Out& out, const Share& share) {
  if (shape.half)
    panels(x, in, picked, rows, static_cast<const std::uint16_t*>(weight), in, out, share);
  else
    panels(x, in, picked, rows, static_cast<const float*>(weight), in, out, share);
}

// ---- what is done to one row

void normalise(const float* x, std::int64_t width, const float* weight, const float* bias, double eps, float* to) {
  Lanes total = all(0.0f), squares = all(0.0f);
  for (std::int64_t i = 0; i < width; i += 16) total = total + (width - i >= 16 ? load(x + i) : load_some(x + i, width - i));
  const Lanes mean = all(sum(total) / float(width));
  for (std::int64_t i = 0; i < width; i += 16) {
    const Lanes off = width - i >= 16 ? load(x + i) - mean : first(load_some(x + i, width - i) - mean, width - i);
    squares = fma(off, off, squares);
  }
  const Lanes scale = all(1.0f / std::sqrt(sum(squares) / float(width) + float(eps)));
  for (std::int64_t i = 0; i < width; i += 16) {
    const std::int64_t left = width - i;
    const bool whole = left >= 16;
    Lanes y = ((whole ? load(x + i) : load_some(x + i, left)) - mean) * scale * (whole ? load(weight + i) : load_some(weight + i, left));
    if (bias) y = y + (whole ? load(bias + i) : load_some(bias + i, left));
    if (whole)
      store(to + i, y);
    else
      store_some(to + i, y, left);
  }
}

// The token's vector, zeros where another slice has it; without its place.
void embed(const Shape& shape, const void* const* weights, std::int64_t token, float* to) {
  token -= shape.first_token;
  if (token < 0 || token >= shape.vocab) {
    std::memset(to, 0, shape.width * sizeof(float));
    return;
  }
  const std::int64_t first = token / kPanel * shape.width * kPanel + token % kPanel;
  for (std::int64_t i = 0; i < shape.width; ++i) {
    if (!shape.tied) {
      to[i] = static_cast<const float*>(weights[0])[token * shape.width + i];
    } else if (shape.half) {
      const std::uint32_t bits = std::uint32_t(static_cast<const std::uint16_t*>(weights[2])[first + i * kPanel]) << 16;
      std::memcpy(to + i, &bits, 4);
    } else {
      to[i] = static_cast<const float*>(weights[2])[first + i * kPanel];
    }
  }
}

// ---- attention of one row and head over the sequence's tokens 0 .. place

struct Cache {
  const float* keys;    // of this layer and head, block 0
  const float* values;
  std::int64_t stride;  // from block to block
  const std::int32_t* table;
};

template <int kCount>
inline void scores(const float* q, std::int64_t size, const Cache& cache, std::int64_t block, Lanes scale, float* to) {
  Lanes sums[kCount];
  const float* keys[kCount];
  for (int b = 0; b < kCount; ++b) {
    sums[b] = all(0.0f);
    keys[b] = cache.keys + cache.table[block + b] * cache.stride;
  }
  for (std::int64_t i = 0; i < size; ++i) {
    const Lanes x = all(q[i]);
    for (int b = 0; b < kCount; ++b) sums[b] = fma(x, load(keys[b] + i * kBlock), sums[b]);
  }
  for (int b = 0; b < kCount; ++b) store(to + (block + b) * kBlock, sums[b] * scale);
}

template <int kVectors>
inline void mix(const float* weights, std::int64_t tokens, const Cache& cache, std::int64_t size, std::int64_t column,
                Lanes share, float* to) {
  Lanes even[kVectors], odd[kVectors];
  for (int v = 0; v < kVectors; ++v) even[v] = odd[v] = all(0.0f);
  for (std::int64_t from = 0; from < tokens; from += kBlock) {
    const float* values = cache.values + cache.table[from / kBlock] * cache.stride + column;
    const std::int64_t here = tokens - from < kBlock ? tokens - from : kBlock;
    std::int64_t t = 0;
    for (; t + 1 < here; t += 2) {
      const Lanes a = all(weights[from + t]), b = all(weights[from + t + 1]);
      for (int v = 0; v < kVectors; ++v) {
        even[v] = fma(a, load(values + t * size + 16 * v), even[v]);
        odd[v] = fma(b, load(values + (t + 1) * size + 16 * v), odd[v]);
      }
    }
    if (t < here)
      for (int v = 0; v < kVectors; ++v)
        even[v] = fma(all(weights[from + t]), load(values + t * size + 16 * v), even[v]);
  }
  for (int v = 0; v < kVectors; ++v) store(to + column + 16 * v, (even[v] + odd[v]) * share);
}

void mix_rest(const float* weights, std::int64_t tokens, const Cache& cache, std::int64_t size, std::int64_t column,
              float share, float* to) {  // the columns of a head whose size is no multiple of 16
  for (; column < size; ++column) {
    float parts[2] = {0.0f, 0.0f};
    for (std::int64_t t = 0; t < tokens; ++t) {
      const float* values = cache.values + cache.table[t / kBlock] * cache.stride;
      parts[t % 2] = std::fma(weights[t], values[t % kBlock * size + column], parts[t % 2]);
    }
    to[column] = (parts[0] + parts[1]) * share;
  }
}

void attend(const float* q, std::int64_t size, std::int64_t tokens, const Cache& cache, float* weights, float* to) {
  const std::int64_t blocks = (tokens + kBlock - 1) / kBlock;
  const Lanes scale = all(1.0f / std::sqrt(float(size)));
  std::int64_t block = 0;
  for (; block + 4 <= blocks; block += 4) scores<4>(q, size, cache, block, scale, weights);
  for (; block < blocks; ++block) scores<1>(q, size, cache, block, scale, weights);
  for (std::int64_t t = tokens; t < blocks * kBlock; ++t) weights[t] = -1e30f;  // not yet there: e^ of it is made 0 below
  Lanes top = load(weights);
  for (block = 1; block < blocks; ++block) top = larger(load(weights + block * kBlock), top);
  const Lanes most = all(largest(top));
  Lanes total = all(0.0f);
  for (block = 0; block < blocks; ++block) {
    Lanes e = exponential(load(weights + block * kBlock) - most);
    if (block == blocks - 1) e = first(e, tokens - block * kBlock);
    store(weights + block * kBlock, e);
    total = total + e;
  }
  const float share = 1.0f / sum(total);
  std::int64_t column = 0;
  for (; column + 64 <= size; column += 64) mix<4>(weights, tokens, cache, size, column, all(share), to);
  for (; column + 16 <= size; column += 16) mix<1>(weights, tokens, cache, size, column, all(share), to);
  mix_rest(weights, tokens, cache, size, column, share, to);
}

#include "mixture.hpp"

// ---- the step

void step(const Shape& shape, const void* const* weights, const Batch& batch, const Share& share) {
  const std::int64_t width = shape.width, size = shape.head_size, rows = batch.rows;
  const std::int64_t inner = shape.heads * size, of_block = inner * kBlock;  // of this slice's heads
  const auto vector = [&](int i) { return static_cast<const float*>(weights[i]); };
  float* x = batch.scratch;
  float* normed = x + rows * width;
  float* qkv = normed + rows * width;
  float* hidden = qkv + rows * 3 * inner;  // the heads' outputs, then the hidden layer
  const std::int64_t picks = shape.experts ? shape.top_k : 1, broad = inner > picks * shape.ffn ? inner : picks * shape.ffn;
  const std::int64_t longest = batch.stride * kBlock;
  float* mixed = hidden + rows * broad;  // of a mixture
  float* attended = mixed + (shape.experts ? rows * (shape.experts + picks + picks * width) : 0) + share.index * longest;
  const std::int64_t begin = rows * share.index / share.count, end = rows * (share.index + 1) / share.count;
  const auto meet = [&] { share.meet(share.with); };
  const auto sum_parts = [&](std::int64_t count) {
    meet();
    if (share.index == 0) batch.sum(count);
    meet();
  };
  // what a slice's heads or hidden layer give, added to x
  const auto add = [&](const float* from, std::int64_t in, int weight) {
    const float* bias = vector(weight + 1);
    if (!shape.sliced) {
      multiply(shape, from, in, nullptr, rows, weights[weight], {x, width, width, bias, After::kAdd, 0}, share);
    } else {
      multiply(shape, from, in, nullptr, rows, weights[weight], {batch.partial, width, width, nullptr, After::kStore, 0},
               share);
      sum_parts(rows * width);
      for (std::int64_t r = begin; r < end; ++r)
        for (std::int64_t i = 0; i < width; ++i) x[r * width + i] += batch.partial[r * width + i] + (bias ? bias[i] : 0.0f);
    }
    meet();
  };

  if (batch.entered) {
    std::memcpy(x + begin * width, batch.entered + begin * width, (end - begin) * width * sizeof(float));
  } else {
    float* to = batch.partial ? batch.partial : x;
    for (std::int64_t r = begin; r < end; ++r) embed(shape, weights, batch.tokens[r], to + r * width);
    if (batch.partial) sum_parts(rows * width);
    for (std::int64_t r = begin; r < end; ++r) {
      const float* position = vector(1) + batch.places[r] * width;
      for (std::int64_t i = 0; i < width; ++i) x[r * width + i] = to[r * width + i] + position[i];
    }
  }
  for (std::int64_t layer = 0; layer < shape.layers; ++layer) {
    const int at = kEnds + kOfLayer * int(layer);
    for (std::int64_t r = begin; r < end; ++r)
      normalise(x + r * width, width, vector(at), vector(at + 1), shape.eps, normed + r * width);
    meet();
    multiply(shape, normed, width, nullptr, rows, weights[at + 2],
             {qkv, 3 * inner, 3 * inner, vector(at + 3), After::kStore, 0}, share);
    meet();
    float* keys = batch.keys + layer * shape.blocks * of_block;
    float* values = batch.values + layer * shape.blocks * of_block;
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t place = batch.places[r], slot = place % kBlock;
      const std::int64_t block = batch.tables[batch.sequences[r] * batch.stride + place / kBlock];
      const float *k = qkv + r * 3 * inner + inner, *v = k + inner;
      float *to_k = keys + block * of_block + slot, *to_v = values + block * of_block + slot * size;
      for (std::int64_t i = 0; i < inner; ++i) to_k[i * kBlock] = k[i];
      for (std::int64_t h = 0; h < shape.heads; ++h)
        std::memcpy(to_v + h * size * kBlock, v + h * size, size * sizeof(float));
    }
    meet();
    const std::int64_t items = rows * shape.heads;
    for (std::int64_t i = items * share.index / share.count; i < items * (share.index + 1) / share.count; ++i) {
      const std::int64_t r = i / shape.heads, h = i % shape.heads, head = h * size * kBlock;
      const Cache cache{keys + head, values + head, of_block, batch.tables + batch.sequences[r] * batch.stride};
      attend(qkv + r * 3 * inner + h * size, size, batch.places[r] + 1, cache, attended, hidden + r * inner + h * size);
    }
    meet();
    add(hidden, inner, at + 4);
    for (std::int64_t r = begin; r < end; ++r)
      normalise(x + r * width, width, vector(at + 6), vector(at + 7), shape.eps, normed + r * width);
    meet();
    if (shape.experts) {
      mixture(shape, batch, weights + at + 8, normed, hidden, mixed, x, share, sum_parts, meet);
      continue;
    }
    multiply(shape, normed, width, nullptr, rows, weights[at + 8],
             {hidden, shape.ffn, shape.ffn, vector(at + 9), After::kActivate, shape.activation}, share);
    meet();
    add(hidden, shape.ffn, at + 10);
  }
  if (batch.left) {
    std::memcpy(batch.left + begin * width, x + begin * width, (end - begin) * width * sizeof(float));
    return;
  }
  for (std::int64_t r = begin; r < end; ++r) normalise(x + r * width, width, vector(3), vector(4), shape.eps, normed + r * width);
  meet();
  if (batch.wanted)
    multiply(shape, normed, width, batch.wants, batch.wanted, weights[2],
             {batch.logits, shape.vocab, shape.vocab, nullptr, After::kStore, 0}, share);
}

}  // namespace
