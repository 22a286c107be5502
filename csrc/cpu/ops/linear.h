// The linear: checks a packed blob, chooses a strategy, packs the activations, runs the kernel on all threads.
#pragma once

#include <cstdint>

#include "core/header.h"
#include "cpu/kernels.h"

namespace sparseprune {

struct LinearCall {
  const std::uint8_t* packed;
  std::int64_t packed_bytes;
  std::int64_t rows, cols;  // the weight's
  Packing packing;
  const void* x;  // [batch, cols], rows `stride` elements apart
  std::int64_t batch, stride;
  const void* bias;  // or null
  void* out;         // [batch, rows], contiguous
  int threads;
  int strategy = -1;  // -1: the plan's choice
};
// Throws std::invalid_argument where `packed` is not the weight that the call says, or no kernel serves it here.
void linear(const LinearCall& call);

// plan.cpp
struct Plan {
  Strategy strategy;
  std::int64_t block;  // batch rows of a block of the panel
  bool serial;         // one thread is the faster
};
// forced: a Strategy, or -1 for the plan's choice. Throws std::invalid_argument where it does not serve.
Plan choose_plan(const KernelTable& table, const PackedHeader& header, std::int64_t batch, int forced = -1);
const char* strategy_name(Strategy strategy);

}  // namespace sparseprune
