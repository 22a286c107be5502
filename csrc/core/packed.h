// Geometry of packed weights: one blob, a header and 64-byte aligned sections. Drawn in docs/formats.md.
//
// Everything about a blob follows from the few numbers in its header, whose checksum finds damage, and the size they
// imply is compared with the size the blob has; no stored offset is ever trusted.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace sparseprune {

// `tile`: tiles of 16 output rows, k-major, a bit per position (2:4, N:M and unstructured weights).
// `csr`: rows of (column, value).
enum class Layout : std::uint8_t { tile = 0, csr = 1 };

constexpr std::int64_t kTileRows = 16;  // lanes of a 512-bit register of float
constexpr std::int64_t kTileK = 32;     // columns are padded to this: one AMX tile of bf16
constexpr std::int64_t kAlign = 64;
constexpr std::int64_t kTailBytes = 64;  // a vector load may read this far past the last value

// Static: the levels' units must share no function, or the linker may keep the copy that an older CPU cannot run.
static constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
static constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return ceil_div(a, b) * b;
}

struct PackedHeader {
  char magic[8];  // "sparsepr"
  std::uint32_t version;
  Layout layout;
  DType dtype;
  std::uint8_t interleave;    // tile: columns that alternate within a lane, 1 or 2 (bf16 pairs for dot products)
  std::uint8_t column_bytes;  // csr: 2 or 4
  std::int64_t rows, cols, nnz;
  std::int64_t reserved[2];  // room for value encodings (int8, int4) and group scales
  std::uint64_t checksum;    // header_checksum() of the bytes before it
};
static_assert(sizeof(PackedHeader) == 64, "the header is one cache line");

constexpr char kMagic[9] = "sparsepr";
constexpr std::uint32_t kPackedVersion = 1;

// Byte offsets of the sections of a blob.
struct Geometry {
  std::int64_t units;    // tile: row tiles, csr: rows
  std::int64_t kpad;     // columns rounded up to kTileK, at least one tile: no kernel meets an empty K
  std::int64_t offsets;  // int64 [units + 1]: index of each unit's first value
  std::int64_t index;    // tile: uint16 masks [units, kpad]; csr: columns [nnz]
  std::int64_t values;   // [nnz]
  std::int64_t total;
};

static constexpr Geometry geometry_of(const PackedHeader& h) {
  Geometry g{};
  const bool tile = h.layout == Layout::tile;
  g.units = tile ? ceil_div(h.rows, kTileRows) : h.rows;
  g.kpad = round_up(h.cols > 0 ? h.cols : 1, kTileK);
  g.offsets = sizeof(PackedHeader);
  g.index = round_up(g.offsets + (g.units + 1) * 8, kAlign);
  const std::int64_t index_bytes = tile ? g.units * g.kpad * 2 : h.nnz * h.column_bytes + kTailBytes;
  g.values = round_up(g.index + index_bytes, kAlign);
  g.total = g.values + h.nnz * static_cast<std::int64_t>(size_of(h.dtype)) + kTailBytes;
  return g;
}

}  // namespace sparseprune
