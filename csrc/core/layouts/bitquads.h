// `bitquads`: int8 or int4 weights of any zero pattern (bitmap, N:M), as the kernels of every CPU level read them. Drawn in
// docs/formats.md.
//
// A tile is 16 rows; a mask is the 64 bits of 4 columns of them, bit 4 * row + column % 4. A chunk is 256 columns of a tile, the
// last one of a tile perhaps fewer. Its kept values lie in the order of the bits, each as a number with a sign:
//
//   int8  n bytes
//   int4  ceil(n / 2) bytes: the first ceil(n / 2) values in the low nibbles, the others in the high ones
//
// offsets: the byte at which each tile's values begin; chunks follow each other. index: masks, uint64 [tiles][kpad / 4].
// Columns are padded to kCols, rows to 16, without values.
#pragma once

#include "core/layouts/codes.h"

namespace sparseprune::bitquads {

constexpr int kRows = 16, kCols = 64;
constexpr std::int64_t kChunkCols = 256;  // of all levels: one decodes to 4 KB of vectors, which stay in L1
constexpr std::int64_t kChunkMasks = kChunkCols / 4;

static constexpr std::int64_t chunks(std::int64_t kpad) {
  return ceil_div(kpad, kChunkCols);
}
// Of a chunk that keeps n values.
static constexpr std::int64_t chunk_bytes(int bits, std::int64_t n) {
  return bits == 8 ? n : (n + 1) / 2;
}
static constexpr int bit_of(int row, std::int64_t col) {
  return static_cast<int>(row * 4 + col % 4);
}

// The last values may be read past by a vector: the scales, at least 64 bytes of them where there is a tile, lie behind them.
static constexpr Geometry geometry(std::int64_t rows, std::int64_t cols, std::int64_t nnz, const Packing& p) {
  Geometry g{};
  g.units = ceil_div(rows, kRows);
  g.kpad = round_up(at_least_one(cols), kCols);
  g.offsets = kHeaderBytes;
  g.index = round_up(g.offsets + (g.units + 1) * 8, kAlign);
  g.values = g.index + g.units * g.kpad * 2;
  const bool nibbles = value_bits(p.encoding, p.dtype) == 4;
  // Each chunk may leave a nibble empty; how many do is not counted, so that the size follows from nnz.
  return codes::geometry(g, nibbles ? (nnz + g.units * chunks(g.kpad)) / 2 : nnz, p);
}

}  // namespace sparseprune::bitquads
