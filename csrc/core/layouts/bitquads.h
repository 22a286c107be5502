// `bitquads`: int8 or int4 weights of any zero pattern (bitmap, N:M), as the kernels of every CPU level read them. Drawn in
// docs/formats.md.
//
// A tile is 16 rows; a mask is the 64 bits of 4 columns of them, bit 4 * row + column % 4. The values that it keeps lie in the
// order of its bits, each as a number with a sign, and those of one mask behind those of the one before:
//
//   int8  a byte each
//   int4  a nibble each, of two streams through the same bytes: the masks of is_high have the high nibbles, the others the low
//         ones. Where a tile's streams differ in length, the shorter one ends with zeros.
//
// offsets: the byte at which each tile's values begin. index: masks, uint64 [tiles][kpad / 4]. Columns are padded to kCols, rows
// to 16, without values.
#pragma once

#include "core/layouts/codes.h"

namespace sparseprune::bitquads {

constexpr int kRows = 16, kCols = 64;

// The i-th mask of a tile. Low, high, high, low, high, low, low, high (Thue and Morse): what is kept by a pattern that repeats every
// 8 or 16 columns is half in either stream, too.
static constexpr bool is_high(std::int64_t i) {
  return (0x96 >> i % 8 & 1) != 0;
}

// value_bytes: of all tiles. A vector may read past the last value: the scales, at least 64 bytes where there is a tile, lie
// behind it.
static constexpr Geometry geometry(std::int64_t rows, std::int64_t cols, std::int64_t value_bytes, const Packing& p) {
  Geometry g{};
  g.units = ceil_div(rows, kRows);
  g.kpad = round_up(at_least_one(cols), kCols);
  g.offsets = kHeaderBytes;
  g.index = round_up(g.offsets + (g.units + 1) * 8, kAlign);
  g.values = g.index + g.units * g.kpad * 2;
  return codes::geometry(g, value_bytes, p);
}

}  // namespace sparseprune::bitquads
