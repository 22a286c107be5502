// Weights in training through codes: what they round to, and the gradients of that (kernels/rounding.inl).
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace sparseprune {

struct RoundCall {
  const float* weight;  // [rows, cols]
  std::int64_t rows, cols;
  std::int64_t group;              // columns that share a scale
  const float *scales, *minimums;  // [rows, ceil(cols / group)]; minimums or null
  const std::uint8_t* kept;        // [rows, cols], 0 where a weight is pruned; or null
  float zero, least, largest;      // of the codes
  int threads;
};

// out: [rows, cols] of the dtype.
void round_to_values(const RoundCall& call, DType dtype, void* out);
// A code that is not a number is that of 0.
void round_to_codes(const RoundCall& call, std::int8_t* out);
// gradient: [rows, cols] of the dtype; of_weight [rows, cols], of_scales and of_minimums (or null) [rows, ceil(cols / group)].
void round_gradients(const RoundCall& call, DType dtype, const void* gradient, float* of_weight, float* of_scales,
                     float* of_minimums);

}  // namespace sparseprune
