// A mixture of experts in the place of a hidden layer (shoal/models/moe.py): a router scores all experts for each row, the
// best few compute, and their answers are added, weighted, the best first. Included by step_body.hpp.
//
// A row's numbers are chains of its own here too: which rows an expert gets beside it decides only where they lie.

struct Routes {  // rows x top_k pairs of row and expert; pair p is of row p / top_k
  std::int64_t* chosen;  // [pairs]: whose
  std::int64_t* place;   // [pairs]: where it stands when sorted by expert, in their order among those of one
  std::int64_t* row;     // [pairs], sorted
  std::int64_t* first;   // [experts + 1]: where each expert's begin
};

// The best of one row's scores [experts], and their parts of the softmax: of all for one, of the best for several.
void choose(float* scores, std::int64_t experts, std::int64_t top, std::int64_t* chosen, float* weights) {
  float most = scores[0];
  for (std::int64_t e = 1; e < experts; ++e)
    if (scores[e] > most) most = scores[e];
  float total = 0.0f;
  for (std::int64_t k = 0; k < top; ++k) {
    std::int64_t best = -1;
    for (std::int64_t e = 0; e < experts; ++e) {
      bool taken = false;
      for (std::int64_t before = 0; before < k; ++before) taken = taken || chosen[before] == e;
      if (!taken && (best < 0 || scores[e] > scores[best])) best = e;
    }
    chosen[k] = best;
    total += weights[k] = sum(first(exponential(all(scores[best] - most)), 1));
  }
  if (top == 1) {
    total = 0.0f;
    for (std::int64_t from = 0; from < experts; from += 16) {
      const std::int64_t here = experts - from < 16 ? experts - from : 16;
      total += sum(first(exponential(load_some(scores + from, here) - all(most)), here));
    }
  }
  for (std::int64_t k = 0; k < top; ++k) weights[k] /= total;
}

void sort_by_expert(const Routes& routes, std::int64_t pairs, std::int64_t experts, std::int64_t top) {
  std::memset(routes.first, 0, (experts + 1) * sizeof(std::int64_t));
  for (std::int64_t p = 0; p < pairs; ++p) ++routes.first[routes.chosen[p] + 1];
  for (std::int64_t e = 0; e < experts; ++e) routes.first[e + 1] += routes.first[e];
  for (std::int64_t p = 0; p < pairs; ++p) {
    const std::int64_t at = routes.first[routes.chosen[p]]++;
    routes.place[p] = at, routes.row[at] = p / top;
  }
  for (std::int64_t e = experts; e > 0; --e) routes.first[e] = routes.first[e - 1];
  routes.first[0] = 0;
}

inline const void* of_expert(const Shape& shape, const void* panels, std::int64_t expert, std::int64_t out, std::int64_t in) {
  const std::int64_t count = (out + kPanel - 1) / kPanel * kPanel * in * (shape.half ? 2 : 4);
  return static_cast<const char*>(panels) + expert * count;
}

// What the experts make of `normed` is added to x. `weights`: up, its biases, down, its biases, router.
template <typename Sum, typename Meet>
void mixture(const Shape& shape, const Batch& batch, const void* const* weights, const float* normed, float* hidden,
             float* scratch, float* x, const Share& share, const Sum& sum_parts, const Meet& meet) {
  const std::int64_t rows = batch.rows, width = shape.width, ffn = shape.ffn, experts = shape.experts, top = shape.top_k;
  const std::int64_t pairs = rows * top, begin = rows * share.index / share.count, end = rows * (share.index + 1) / share.count;
  float *scores = scratch, *parts = scores + rows * experts, *answers = batch.partial ? batch.partial : parts + pairs;
  const Routes routes{batch.routes, batch.routes + pairs, batch.routes + 2 * pairs, batch.routes + 3 * pairs};
  const float *up_bias = static_cast<const float*>(weights[1]), *down_bias = static_cast<const float*>(weights[3]);

  panels(normed, width, nullptr, rows, static_cast<const float*>(weights[4]), width,
         {scores, experts, experts, nullptr, After::kStore, 0}, share);
  meet();
  for (std::int64_t r = begin; r < end; ++r)
    choose(scores + r * experts, experts, top, routes.chosen + r * top, parts + r * top);
  meet();
  if (share.index == 0) sort_by_expert(routes, pairs, experts, top);
  meet();
  const auto each = [&](const auto& compute) {
    for (std::int64_t own = 0; own < shape.own_experts; ++own) {
      const std::int64_t from = routes.first[shape.first_expert + own], count = routes.first[shape.first_expert + own + 1] - from;
      if (count) compute(own, from, count);
    }
    meet();
  };
  each([&](std::int64_t own, std::int64_t from, std::int64_t count) {
    multiply(shape, normed, width, routes.row + from, count, of_expert(shape, weights[0], own, ffn, width),
             {hidden + from * ffn, ffn, ffn, up_bias ? up_bias + own * ffn : nullptr, After::kActivate, shape.activation}, share);
  });
  if (shape.own_experts < experts) {  // the answers of those elsewhere come by the sum, which adds nothing to any
    for (std::int64_t p = begin * top; p < end * top; ++p) std::memset(answers + p * width, 0, width * sizeof(float));
    meet();
  }
  each([&](std::int64_t own, std::int64_t from, std::int64_t count) {
    const float* bias = down_bias && !shape.sliced ? down_bias + own * width : nullptr;
    multiply(shape, hidden + from * ffn, ffn, nullptr, count, of_expert(shape, weights[2], own, width, ffn),
             {answers + from * width, width, width, bias, After::kStore, 0}, share);
  });
  if (batch.partial) sum_parts(pairs * width);
  for (std::int64_t r = begin; r < end; ++r)
    for (std::int64_t i = 0; i < width; ++i) {
      float total = 0.0f;
      for (std::int64_t p = r * top; p < (r + 1) * top; ++p) {
        float answer = answers[routes.place[p] * width + i];
        if (down_bias && shape.sliced) answer += down_bias[routes.chosen[p] * width + i];
        const float weighted = parts[p] * answer;
        total = p == r * top ? weighted : total + weighted;
      }
      x[r * width + i] += total;
    }
  meet();
}
