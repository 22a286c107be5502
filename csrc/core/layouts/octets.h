// `octets`: 2:4 int8 or int4 weights, as the kernels of every CPU level read them. Drawn in docs/formats.md.
//
// A tile is 16 rows; an octet is 8 columns of a row and the 4 values that it keeps, 2 of each 4 columns. A unit is 32
// columns of a tile: 64 bytes of places, then the values of its 4 octets.
//
//   places  byte 4 * row + i, bits 2j and 2j + 1: where in its 4 columns the i-th value of octet j lies
//   values  int8: [4 octets][16 rows][4]; int4: [2][16 rows][4], codes of octet 2h in the low nibbles of byte row h, of
//           octet 2h + 1 in the high ones; a code is the value + 8
//
// Columns are padded to kCols, rows to 16: places 0 and 1 of each 4 columns, and values 0.
#pragma once

#include "core/layouts/codes.h"

namespace sparseprune::octets {

constexpr int kRows = 16, kCols = 64;
constexpr int kUnitCols = 32;
constexpr int kPlaces = 64;  // bytes of a unit, before the values

static constexpr std::int64_t unit_bytes(int bits) {
  return kPlaces + 4 * 64 * bits / 8;
}
static constexpr std::int64_t tile_bytes(int bits, std::int64_t kpad) {
  return kpad / kUnitCols * unit_bytes(bits);
}
// The nth (0 or 1) value of the 4 columns that `col` is among. row: in the tile.
static constexpr std::int64_t place_byte(int bits, int row, std::int64_t col, int nth) {
  return col / kUnitCols * unit_bytes(bits) + row * 4 + col % 8 / 4 * 2 + nth;
}
static constexpr int place_shift(std::int64_t col) {
  return static_cast<int>(col % kUnitCols / 8 * 2);
}
static constexpr std::int64_t value_byte(int bits, int row, std::int64_t col, int nth) {
  const std::int64_t octet = col % kUnitCols / 8;
  return place_byte(bits, row, col, nth) + kPlaces + (bits == 8 ? octet : octet / 2) * 64;
}
static constexpr int value_shift(int bits, std::int64_t col) {
  return bits == 8 ? 0 : static_cast<int>(col % 16 / 8 * 4);
}

static constexpr Geometry geometry(std::int64_t rows, std::int64_t cols, const Packing& p) {
  const std::int64_t kpad = round_up(at_least_one(cols), kCols);
  const auto bits = static_cast<int>(value_bits(p.encoding, p.dtype));
  return codes::geometry(ceil_div(rows, kRows), kpad, tile_bytes(bits, kpad), p);
}

}  // namespace sparseprune::octets
