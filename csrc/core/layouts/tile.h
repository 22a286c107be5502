// `tile`, for CPUs: tiles of 16 output rows, k-major, a bit per position (2:4, N:M and unstructured weights).
#pragma once

#include "core/layouts/geometry.h"

namespace sparseprune {

constexpr std::int64_t kTileRows = 16;  // lanes of a 512-bit register of float
constexpr std::int64_t kTileK = 32;     // columns are padded to this: one AMX tile of bf16

// index: uint16 masks [units, kpad].
static constexpr Geometry tile_geometry(std::int64_t rows, std::int64_t cols, std::int64_t value_bytes) {
  Geometry g{};
  g.units = ceil_div(rows, kTileRows);
  g.kpad = round_up(at_least_one(cols), kTileK);
  g.offsets = kHeaderBytes;
  g.index = round_up(g.offsets + (g.units + 1) * 8, kAlign);
  g.values = round_up(g.index + g.units * g.kpad * 2, kAlign);
  g.total = g.values + value_bytes + kTailBytes;
  return g;
}

}  // namespace sparseprune
