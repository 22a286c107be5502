// The header of a packed weight, made and checked here for the CPU's blobs and the GPU's alike.
//
// Everything about a blob follows from the few numbers in its header, whose checksum finds damage, and the size they imply is
// compared with the size the blob has; no stored offset is ever trusted. Whatever is wrong is a std::invalid_argument.
#pragma once

#include <cstdint>

#include "core/layouts/geometry.h"
#include "core/packing.h"

namespace sparseprune {

struct PackedHeader {
  char magic[8];  // "sparsepr"
  std::uint32_t version;
  Layout layout;
  DType dtype;
  Encoding encoding;
  std::uint8_t interleave;  // tile: columns that alternate within a lane, 1 or 2 (bf16 pairs for dot products)
  std::int64_t rows, cols, nnz;
  std::int64_t stored;  // values in the blob, on a GPU the padding among them; bitquads: bytes of them
  std::uint16_t group;
  DType scales;
  std::uint8_t reserved[5];
  std::uint64_t checksum;  // covers the bytes before it
};
static_assert(sizeof(PackedHeader) == kHeaderBytes, "the header is one cache line");

constexpr std::uint32_t kPackedVersion = 1;

static constexpr Packing packing_of(const PackedHeader& h) {
  return {h.layout, h.dtype, h.encoding, h.group, h.scales};
}

// Where a blob lies decides which layouts it may have.
enum class Home { cpu, cuda };

// nnz: ignored where it follows from the shape (dense and 2:4 codes). stored: bitmap8's number of values with their padding,
// bitquads' bytes of values; the other layouts' follows from the rest.
PackedHeader make_header(Home home, std::int64_t rows, std::int64_t cols, const Packing& packing, std::int64_t nnz,
                         std::int64_t stored = 0, int interleave = 1);

Geometry geometry_of(const PackedHeader& header);

// The header of a blob of `size` bytes, of which `begin` shows the first 64 at least where there are so many.
PackedHeader read_header(Home home, const void* begin, std::int64_t size);
// The blob must hold what the call says that it does.
void require_same(const PackedHeader& header, std::int64_t rows, std::int64_t cols, const Packing& packing);

// A blob on a GPU, whose header nobody here has seen: its sections, if a weight of this shape and packing can have that size.
struct HiddenBlob {
  Geometry geometry;
  std::int64_t stored;  // values; bitmap8: up to 63 bytes more than were packed
};
HiddenBlob require_hidden(std::int64_t rows, std::int64_t cols, const Packing& packing, std::uintptr_t blob,
                          std::int64_t size);

}  // namespace sparseprune
