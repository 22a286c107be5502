// `csr`, for CPUs: rows of (column, value).
#pragma once

#include "core/layouts/tile.h"

namespace sparseprune {

// Of a column's number.
static constexpr std::uint8_t csr_column_bytes(std::int64_t cols) {
  return cols <= 65536 ? 2 : 4;
}

// index: columns [nnz]. Activations are padded as for tiles.
static constexpr Geometry csr_geometry(std::int64_t rows, std::int64_t cols, std::int64_t nnz, std::int64_t value_bytes) {
  Geometry g{};
  g.units = rows;
  g.kpad = round_up(at_least_one(cols), kTileK);
  g.offsets = kHeaderBytes;
  g.index = round_up(g.offsets + (g.units + 1) * 8, kAlign);
  g.values = round_up(g.index + nnz * csr_column_bytes(cols) + kTailBytes, kAlign);
  g.total = g.values + value_bytes + kTailBytes;
  return g;
}

}  // namespace sparseprune
