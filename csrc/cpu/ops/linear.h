// The linear: checks a packed blob, chooses a strategy, packs the activations, runs the kernel on all threads.
#pragma once

#include <cstdint>

#include "core/packed.h"
#include "cpu/kernels.h"

namespace sparseprune {

// A blob whose header and size agree; the sections' addresses.
struct PackedView {
  PackedHeader header;
  Geometry geometry;
  const std::int64_t* offsets;
  const void* index;
  const void* values;
};
// Throws std::invalid_argument where the blob is not a packed weight of this version, or its header is damaged.
PackedView view_packed(const std::uint8_t* blob, std::int64_t size);

struct LinearCall {
  const std::uint8_t* packed;
  std::int64_t packed_bytes;
  const void* x;  // [batch, cols], rows `stride` elements apart
  std::int64_t batch, cols, stride;
  const void* bias;  // or null
  void* out;         // [batch, rows], contiguous
  std::int64_t rows;
  DType dtype;
  int threads;
  int strategy = -1;  // -1: the plan's choice
};
void linear(const LinearCall& call);

// plan.cpp
struct Plan {
  Strategy strategy;
  std::int64_t block;  // batch rows of a block of the panel
};
// forced: a Strategy, or -1 for the plan's choice. Throws std::invalid_argument where it does not serve.
Plan choose_plan(const KernelTable& table, const PackedHeader& header, std::int64_t batch, int forced = -1);
const char* strategy_name(Strategy strategy);

}  // namespace sparseprune
