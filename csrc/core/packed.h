// Geometry of packed weights: one blob, a header and 64-byte aligned sections. Drawn in docs/formats.md.
//
// Everything about a blob follows from the few numbers in its header, whose checksum finds damage, and the size they
// imply is compared with the size the blob has; no stored offset is ever trusted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/dtype.h"
#include "core/fragments.h"

namespace sparseprune {

// A matrix in memory, row-major and contiguous.
struct Matrix {
  std::int64_t rows, cols;
  DType dtype;
};

// CPU: `tile`, tiles of 16 output rows, k-major, a bit per position (2:4, N:M and unstructured weights); `csr`, rows of
// (column, value). CUDA: `sparse24` and `bitmap8`, drawn in core/fragments.h.
enum class Layout : std::uint8_t { tile = 0, csr = 1, sparse24 = 2, bitmap8 = 3 };
constexpr int kLayouts = 4;
static constexpr bool is_cuda(Layout layout) {
  return layout == Layout::sparse24 || layout == Layout::bitmap8;
}

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
  std::int64_t stored;     // cuda: values in the blob, the padding among them; else 0
  std::int64_t reserved;   // room for value encodings (int8, int4) and group scales
  std::uint64_t checksum;  // header_checksum() of the bytes before it
};
static_assert(sizeof(PackedHeader) == 64, "the header is one cache line");

constexpr char kMagic[9] = "sparsepr";
constexpr std::uint32_t kPackedVersion = 1;

// Each step is a bijection of the sum, so a change within one word always shows.
[[maybe_unused]] static inline std::uint64_t header_checksum(const PackedHeader& header) {
  std::uint64_t words[offsetof(PackedHeader, checksum) / 8];
  std::memcpy(words, &header, sizeof words);
  std::uint64_t sum = 0xcbf29ce484222325u;  // the constants of FNV-1a
  for (const std::uint64_t word : words) sum = (sum ^ word) * 0x100000001b3u;
  return sum;
}

// Byte offsets of the sections of a blob.
struct Geometry {
  std::int64_t units;    // tile: row tiles, csr: rows, cuda: strips of rows x blocks of columns
  std::int64_t kpad;     // columns rounded up to whole blocks, at least one: no kernel meets an empty K
  std::int64_t offsets;  // int64 [units + 1]: index of each unit's first value; sparse24 needs none and has none
  std::int64_t index;    // tile: uint16 masks [units, kpad]; csr: columns [nnz]; cuda: core/fragments.h
  std::int64_t values;   // [nnz], cuda: [stored]
  std::int64_t total;
};

// The host cannot read the header of a blob on a GPU without waiting for it. The size, modulo 64, says what it must know:
// the layout (odd, as no size of a blob for a CPU is), and of shape and dtype as much as tells apart what has the same
// geometry: 40 and 41 columns, a matrix and its transpose, n values and half as many that are twice as wide.
static constexpr std::int64_t size_tag(const PackedHeader& h) {
  return (h.layout == Layout::sparse24 ? 1 : 3) + 4 * ((h.rows + 2 * h.cols + 7 * static_cast<int>(h.dtype)) % 15);
}
static constexpr Layout layout_of_size(std::int64_t size) {
  return size % 4 == 1 ? Layout::sparse24 : size % 4 == 3 ? Layout::bitmap8 : Layout::tile;
}

static constexpr Geometry geometry_of(const PackedHeader& h) {
  Geometry g{};
  const std::int64_t cols = h.cols > 0 ? h.cols : 1;
  const std::int64_t item = static_cast<std::int64_t>(size_of(h.dtype));
  g.offsets = sizeof(PackedHeader);
  if (is_cuda(h.layout)) {
    const bool sparse = h.layout == Layout::sparse24;
    g.kpad = round_up(cols, sparse ? sparse24::kCols : bitmap8::kCols);
    g.units =
        ceil_div(h.rows, sparse ? sparse24::kRows : bitmap8::kRows) * (g.kpad / (sparse ? sparse24::kCols : bitmap8::kCols));
    g.index = sparse ? g.offsets : round_up(g.offsets + (g.units + 1) * 8, kAlign);
    g.values = g.index + g.units * (sparse ? sparse24::kWords * 4 : bitmap8::kTiles * 8);
    g.total = round_up(g.values + h.stored * item, kAlign) + size_tag(h);
    return g;
  }
  const bool tile = h.layout == Layout::tile;
  g.units = tile ? ceil_div(h.rows, kTileRows) : h.rows;
  g.kpad = round_up(cols, kTileK);
  g.index = round_up(g.offsets + (g.units + 1) * 8, kAlign);
  const std::int64_t index_bytes = tile ? g.units * g.kpad * 2 : h.nnz * h.column_bytes + kTailBytes;
  g.values = round_up(g.index + index_bytes, kAlign);
  g.total = g.values + h.nnz * item + kTailBytes;
  return g;
}

// A blob on a GPU, seen from the host: its layout and stored values follow from its size and the weight's shape.
// False where they do not.
static constexpr bool cuda_geometry(const Matrix& m, std::int64_t size, PackedHeader* h, Geometry* g) {
  *h = PackedHeader{};
  h->rows = m.rows, h->cols = m.cols, h->dtype = m.dtype, h->layout = layout_of_size(size);
  if (!is_cuda(h->layout)) return false;
  *g = geometry_of(*h);
  const std::int64_t item = static_cast<std::int64_t>(size_of(m.dtype));
  if (h->layout == Layout::sparse24) {
    h->stored = g->units * sparse24::kValues;
    if (item != 2) return false;
  } else {
    h->stored = (size - size % kAlign - g->values) / item;  // up to 63 bytes more than were packed
    if (h->stored < 0 || h->stored > g->units * bitmap8::kRows * bitmap8::kCols + kAlign) return false;
  }
  *g = geometry_of(*h);
  return g->total == size;
}

}  // namespace sparseprune
