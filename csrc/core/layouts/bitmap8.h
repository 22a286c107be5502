// `bitmap8`, for GPUs: unstructured, any value type; bitmaps of 8 x 8, in the order of the A operand of mma.m16n8k16. A unit
// is 16 rows x 64 columns: 4 steps of 16 columns, each of 4 bitmaps (rows 0-7 and 8-15 of the first 8 columns, then of the
// next 8). Bit 8 * row + col: lane L of a warp owns bits 2L and 2L + 1. The values of a unit lie in the order of the bits;
// zeros fill them up to a multiple of 8, so that each unit begins at 16 bytes. Units lie [strip of rows][block of columns].
#pragma once

#include "core/layouts/geometry.h"

namespace sparseprune::bitmap8 {

constexpr int kRows = 16, kCols = 64;
constexpr int kTiles = 16;  // bitmaps of a unit
constexpr int kRound = 8;   // values of a unit are rounded up to this

SP_SHARED_CODE constexpr int tile_row(int tile) {
  return tile % 2 * 8;
}
SP_SHARED_CODE constexpr int tile_col(int tile) {
  return tile / 4 * 16 + tile % 4 / 2 * 8;
}

// index: uint64 [units, kTiles].
static constexpr Geometry geometry(std::int64_t rows, std::int64_t cols, std::int64_t value_bytes) {
  Geometry g{};
  g.kpad = round_up(at_least_one(cols), kCols);
  g.units = ceil_div(rows, kRows) * (g.kpad / kCols);
  g.offsets = kHeaderBytes;
  g.index = round_up(g.offsets + (g.units + 1) * 8, kAlign);
  g.values = g.index + g.units * kTiles * 8;
  g.total = round_up(g.values + value_bytes, kAlign);
  return g;
}

}  // namespace sparseprune::bitmap8
