// Adding up (or taking the minimum, ... of) the ranks' elements, in the order of ranks.
#pragma once

#include "shm_types.hpp"

namespace shoal {

// For each i < count: ((ins[0][i] op ins[1][i]) op ins[2][i]) ..., rounded once, is written to every outs[.][i].
// 16-bit floats are combined in f32; AVG divides by in_count at the end. An output may be one of the inputs.
// Needs can_reduce(dtype, op).
void combine(DType dtype, ReduceOp op, void* const* outs, int out_count, const void* const* ins, int in_count,
             std::size_t count);

}  // namespace shoal
