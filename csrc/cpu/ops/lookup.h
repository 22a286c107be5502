// The lookup: rows of a packed weight as numbers, which is what an embedding is asked for.
#pragma once

#include <cstdint>

#include "core/packing.h"

namespace sparseprune {

struct LookupCall {
  const std::uint8_t* packed;
  std::int64_t packed_bytes;
  std::int64_t rows, cols;  // of the weight
  Packing packing;          // layout quads
  const void* indices;      // [count], int64 or int32
  int index_bytes;          // 8 or 4
  std::int64_t count;
  void* out;  // [count, cols], contiguous, of the packing's dtype
  int threads;
};
// Each number is code * scale (+ minimum) in float32, rounded to the dtype. Throws std::invalid_argument where `packed` is
// not the weight that the call says or not of layout quads, std::out_of_range where an index is not a row; then nothing is
// written.
void lookup(const LookupCall& call);

}  // namespace sparseprune
