// `quads`: dense int8 or int4 weights, as the kernels of every CPU level read them. Drawn in docs/formats.md.
//
// A tile is 16 rows; a vector is 64 bytes, 4 for each row: a row's 4 bytes are 4 columns of it (int8, value + 128), or
// 4 columns in the low nibbles and the next 4 in the high ones (int4, the code). Vectors follow each other along the
// columns, padded to kCols with `padding`, which stands for the value 0; padded rows hold it too.
#pragma once

#include "core/layouts/codes.h"

namespace sparseprune::quads {

constexpr int kRows = 16, kCols = 64;
constexpr int kVector = 64;

static constexpr std::int64_t tile_bytes(int bits, std::int64_t kpad) {
  return kpad * kRows * bits / 8;
}
// row: in the tile.
static constexpr std::int64_t byte_of(int bits, int row, std::int64_t col) {
  const std::int64_t step = bits == 8 ? 4 : 8;  // columns of a vector
  return col / step * kVector + row * 4 + col % 4;
}
static constexpr int shift_of(int bits, std::int64_t col) {
  return bits == 8 || col % 8 < 4 ? 0 : 4;
}
// Of a whole byte. With minimums, nothing is 0: a padded column meets activations that are 0, a padded row is not written.
static constexpr std::uint8_t padding(int bits) {
  return bits == 8 ? 0x80 : 0x88;
}

static constexpr Geometry geometry(std::int64_t rows, std::int64_t cols, const Packing& p) {
  const std::int64_t kpad = round_up(at_least_one(cols), kCols);
  const auto bits = static_cast<int>(value_bits(p.encoding, p.dtype));
  return codes::geometry(ceil_div(rows, kRows), kpad, tile_bytes(bits, kpad), p);
}

}  // namespace sparseprune::quads
