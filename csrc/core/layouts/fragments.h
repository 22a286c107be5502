// `fragments` (dense) and `fragments24` (2:4), for GPUs: int8 or int4 codes in the order of the A operand of mma.m16n8k16,
// or of the compressed one of mma.sp.m16n8k32 (PTX ISA, "matrix fragments"). Drawn in docs/formats.md.
//
// Of 2:4, "columns" are here the kept ones, two of every four: operand and codes have the same order in both layouts.
//
// A unit is 32 rows x 64 columns of the dense weight, one piece of memory:
//
//   codes     [chunks][32 lanes][4 words]: word ((step * 2 + tile) * words of a fragment + i), i fastest, of a lane's
//             fragment for a step of 16 columns and a tile of 16 rows. Its 4 registers hold 2 neighbouring columns each:
//               int4  one word, register r's columns in the nibbles r and r + 4; the code
//               int8  two words, register r's in the bytes 2 (r % 2) and the next of word r / 2; the code + 128
//   places    fragments24: the metadata, 32 lanes x 2 words, as `sparse24` has it
//   sets      of scales, one for each group of columns (two for groups of 32), a set again in the next unit for groups of
//             128: uint16 [8][4], of rows g, g + 8, g + 16 and g + 24; with minimums these likewise behind them
//
// Padding: codes of 0 (with minimums: of the minimum), scales and minimums 0, places 0 and 1. Units lie [strip of
// rows][block of columns].
#pragma once

#include "core/layouts/sparse24.h"
#include "core/packing.h"

namespace sparseprune::fragments {

constexpr int kRows = 32, kCols = 64;
constexpr int kSetBytes = 2 * kRows;  // scales of a group of columns, or its minimums
constexpr int kPlaceBytes = 4 * sparse24::kWords;

// What a unit consists of. two_four: layout fragments24.
struct Unit {
  int bits;
  bool two_four, minimums;
  int sets;

  SP_SHARED_CODE constexpr int cols() const {  // that have codes
    return two_four ? kCols / 2 : kCols;
  }
  SP_SHARED_CODE constexpr int words() const {  // of a lane
    return kRows * cols() / 32 * bits / 32;
  }
  SP_SHARED_CODE constexpr int code_bytes() const {
    return 128 * words();
  }
  SP_SHARED_CODE constexpr int sets_begin() const {
    return code_bytes() + (two_four ? kPlaceBytes : 0);
  }
  SP_SHARED_CODE constexpr int set_bytes() const {
    return minimums ? 2 * kSetBytes : kSetBytes;
  }
  SP_SHARED_CODE constexpr int bytes() const {
    return sets_begin() + sets * set_bytes();
  }
};

static constexpr Unit unit_of(const Packing& p) {
  return {static_cast<int>(value_bits(p.encoding, p.dtype)), p.layout == Layout::fragments24, has_minimums(p.encoding),
          p.group == 32 ? 2 : 1};
}

// Where a code is, within a unit. row: 0 to 31; col: of those that have codes.
SP_SHARED_CODE constexpr int code_byte(int bits, int row, int col) {
  const int i = row % 16, c = col % 16, reg = i / 8 + 2 * (c / 8), lane = 4 * (i % 8) + c % 8 / 2;
  const int fragment = col / 16 * 2 + row / 16;
  const int word = bits == 8 ? fragment * 2 + reg / 2 : fragment;
  const int byte = bits == 8 ? 2 * (reg % 2) + c % 2 : reg / 2 + 2 * (c % 2);
  return (word / 4 * 32 + lane) * 16 + word % 4 * 4 + byte;
}
SP_SHARED_CODE constexpr int code_shift(int bits, int row) {
  return bits == 8 ? 0 : row % 16 / 8 * 4;
}

// And back: what lane `lane` has as value `nth` of its word `word`. 8 values of 4 bits, or 4 of 8, from the lowest on.
struct Place {
  int row, col;
};
SP_SHARED_CODE constexpr Place place_of(int bits, int lane, int word, int nth) {
  const int fragment = bits == 8 ? word / 2 : word;
  const int reg = bits == 8 ? word % 2 * 2 + nth / 2 : nth % 4, half = bits == 8 ? nth % 2 : nth / 4;
  return {fragment % 2 * 16 + reg % 2 * 8 + lane / 4, fragment / 2 * 16 + reg / 2 * 8 + 2 * (lane % 4) + half};
}

// Where a row's scale is in a set, in scales.
SP_SHARED_CODE constexpr int scale_index(int row) {
  return row % 8 * 4 + row / 8;
}

SP_SHARED_CODE constexpr std::uint8_t zero_code(int bits) {
  return bits == 8 ? 128 : 8;
}

static constexpr std::int64_t blocks(std::int64_t cols) {
  return ceil_div(at_least_one(cols), kCols);
}

static constexpr Geometry geometry(std::int64_t rows, std::int64_t cols, const Packing& p) {
  Geometry g{};
  g.units = ceil_div(rows, kRows) * blocks(cols);
  g.kpad = blocks(cols) * kCols;
  g.offsets = g.index = g.values = kHeaderBytes;
  g.total = g.values + g.units * unit_of(p).bytes();
  return g;
}

// That the two are each other's inverse.
static constexpr bool place_inverts_code_byte(int bits) {
  for (int row = 0; row < kRows; ++row) {
    for (int col = 0; col < kCols; ++col) {
      const int byte = code_byte(bits, row, col), lane = byte / 16 % 32, word = byte / 512 * 4 + byte % 16 / 4;
      const Place p = place_of(bits, lane, word, (byte % 4 * 8 + code_shift(bits, row)) / bits);
      if (p.row != row || p.col != col) return false;
    }
  }
  return true;
}
static_assert(place_inverts_code_byte(4) && place_inverts_code_byte(8));

}  // namespace sparseprune::fragments
