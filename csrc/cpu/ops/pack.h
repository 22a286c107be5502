// Canonical weights to packed blobs and back, on the CPU. Parallel over tiles or rows.
//
// bits: [rows, ceil(cols/8)], lowest bit first, padding zero; null where all columns are kept. offsets: int64 [rows + 1], index of a row's first value.
#pragma once

#include <cstdint>

#include "core/header.h"

namespace sparseprune {

// A canonical weight: what SparseWeight.parts() names.
struct Canonical {
  const void* values;
  const std::uint8_t* bits;
  const std::int64_t* offsets;  // null for codes in `quads` and `octets`, whose number follows from the shape
  const std::uint16_t* scales = nullptr;
  const std::uint16_t* minimums = nullptr;  // [rows, ceil(cols / group)] as scales, or null
};

// A blob whose header and size agree; the sections' addresses.
struct PackedView {
  PackedHeader header;
  Geometry geometry;
  const std::int64_t* offsets;
  const void* index;
  const void* values;
};
// Throws std::invalid_argument where the blob is not a packed weight for a CPU, or its header is damaged (core/header.h).
PackedView view_packed(const std::uint8_t* blob, std::int64_t size);

// bits: for layout bitquads, whose size depends on them.
std::int64_t packed_bytes(std::int64_t rows, std::int64_t cols, const Packing& packing, std::int64_t nnz,
                          const std::uint8_t* bits = nullptr);
void pack(std::int64_t rows, std::int64_t cols, const Packing& packing, const Canonical& weight, std::uint8_t* blob,
          int threads);
void unpack_bits(const std::uint8_t* blob, std::int64_t size, std::uint8_t* bits, int threads);
void unpack_values(const std::uint8_t* blob, std::int64_t size, const std::int64_t* offsets, void* values, int threads);
// scales, minimums (where the encoding has them): [rows, ceil(cols / group)].
void unpack_scales(const std::uint8_t* blob, std::int64_t size, std::uint16_t* scales, std::uint16_t* minimums, int threads);

}  // namespace sparseprune
