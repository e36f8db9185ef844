// One step of a GPT over rows that belong to any number of sequences, with a paged cache of keys and values.
//
// Every number is one fixed chain of roundings: a product with a weight matrix adds over its inputs in order, an attention
// adds over a sequence's own tokens in order. No chain knows which other rows are in the step, how many there are, how
// wide the processor's vectors are or how many threads run: the same token of the same sequence gets the same bits.
#pragma once

#include <cstdint>

namespace generation {

constexpr std::int64_t kBlock = 16;   // tokens of a cache block: shoal.serve.generation.step.BLOCK
constexpr std::int64_t kPanel = 48;   // outputs of a weight panel: shoal.serve.generation.packing.PANEL

// Of this process's part of a model: some of its layers; of each, some of the heads and of the hidden layer; some tokens.
struct Shape {
  std::int64_t layers, heads, head_size, width, ffn, vocab;
  std::int64_t activation;  // 0 gelu, 1 gelu by tanh, 2 relu
  std::int64_t tied;        // the token vectors are the panels of the head
  std::int64_t half;        // the panels are bfloat16
  std::int64_t blocks;      // of the cache
  std::int64_t first_token; // of those that this part has
  std::int64_t sliced;      // heads and hidden layers are slices: what they give is added over the slices
  std::int64_t experts, top_k;  // of a mixture in the place of the hidden layer; 0: a plain one
  std::int64_t first_expert, own_experts;  // those that this part has
  double eps;               // of the layer norms
};

// Pointers: tokens, positions, head, norm.weight, norm.bias, then of each layer norm1.weight, norm1.bias, qkv, qkv.bias,
// out, out.bias, norm2.weight, norm2.bias, up, up.bias, down, down.bias, router. A bias may be null, and what a part does
// not use. Of a mixture, up and down and their biases are those of its own experts, one after the other.
constexpr int kEnds = 5, kOfLayer = 13;

struct Batch {
  std::int64_t rows;
  const std::int64_t* tokens;     // [rows]
  const std::int64_t* places;     // [rows]: where in its sequence
  const std::int64_t* sequences;  // [rows]: whose row of the tables
  const std::int32_t* tables;     // [sequences, stride]: block numbers
  std::int64_t stride;
  std::int64_t wanted;
  const std::int64_t* wants;      // [wanted]: rows whose logits are wanted
  float* logits;                  // [wanted, vocab]
  float* keys;                    // [layers, blocks, heads, head_size, kBlock]
  float* values;                  // [layers, blocks, heads, kBlock, head_size]
  float* scratch;                 // rows x (2 width + 3 heads head_size + max(heads head_size, picks ffn)), for a mixture
                                  // rows x (experts + picks + picks width) more, and for each thread the longest
                                  // sequence in whole blocks; picks: top_k, or 1
  std::int64_t* routes;           // 3 rows top_k + experts + 1, of a mixture
  const float* entered;           // [rows, width] from the layers before; null: this part begins with the tokens
  float* left;                    // [rows, width] for the layers after; null: this part ends with the logits
  float* partial;                 // [rows, picks width] of this part, which `sum` adds to those of the others of its
                                  // stage; null: there are none
  void (*sum)(std::int64_t count);
};

struct Share {  // this thread's part of the work, and how it meets the others
  std::int64_t index, count;
  void (*meet)(void*);
  void* with;
};

using Step = void (*)(const Shape&, const void* const*, const Batch&, const Share&);
Step avx512_step();  // null where it was not compiled
Step avx2_step();
Step plain_step();

}  // namespace generation
