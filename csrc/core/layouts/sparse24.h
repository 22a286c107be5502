// `sparse24`, for GPUs: 2:4 in 16-bit values, the compressed A operand and the metadata of mma.sp.m16n8k32 (PTX ISA,
// "sparse mma"). A unit is 32 rows x 64 columns: 2 steps of 32 columns, each of 2 tiles of 16 rows, each of 32 lanes x 8
// values (one 16-byte load); and 32 lanes x 2 words of metadata (one 8-byte load: one word per step, both tiles by the selectors
// 0 and 1). Units lie [strip of rows][block of columns]. Every function of an element works within one unit.
#pragma once

#include "core/layouts/geometry.h"

namespace sparseprune::sparse24 {

constexpr int kRows = 32, kCols = 64;
constexpr int kValues = kRows * kCols / 2;  // in a unit
constexpr int kWords = 64;
constexpr int kBits = 16;  // per value

// A chunk is 4 columns of a row; it keeps two values, at places lower < higher. row: 0 to 31, chunk: 0 to 15.
SP_SHARED_CODE constexpr int value_index(int row, int chunk) {  // where the first of the two is
  const int i = row % 16, step = chunk / 8, c = chunk % 8;
  const int lane = 4 * (i % 8) + c % 4, reg = i / 8 + 2 * (c / 4);
  return ((step * 2 + row / 16) * 32 + lane) * 8 + reg * 2;
}
SP_SHARED_CODE constexpr int word_index(int row, int chunk) {
  const int i = row % 16, step = chunk / 8, c = chunk % 8;
  return (4 * (i % 8) + 2 * (row / 16) + c / 4) * 2 + step;
}
SP_SHARED_CODE constexpr int word_shift(int row, int chunk) {  // where the nibble lower | higher << 2 is
  return 16 * (row % 16 / 8) + 4 * (chunk % 4);
}

static constexpr std::int64_t units(std::int64_t rows, std::int64_t cols) {
  return ceil_div(rows, kRows) * ceil_div(at_least_one(cols), kCols);
}

// index: metadata, uint32 [units, kWords]; values [units, kValues].
static constexpr Geometry geometry(std::int64_t rows, std::int64_t cols, std::int64_t value_bytes) {
  Geometry g{};
  g.units = units(rows, cols);
  g.kpad = round_up(at_least_one(cols), kCols);
  g.offsets = g.index = kHeaderBytes;
  g.values = g.index + g.units * kWords * 4;
  g.total = round_up(g.values + value_bytes, kAlign);
  return g;
}

}  // namespace sparseprune::sparse24
