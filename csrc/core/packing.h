// How a weight is packed: what a call must know of a blob beside the weight's shape. A host cannot read the header of a blob
// on a GPU without waiting for it, so callers keep this number beside the blob and pass it along.
#pragma once

#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "core/encoding.h"

namespace sparseprune {

// A file each in core/layouts (fragments24 is in fragments.h). CPU: `tile`, `csr` of plain values, `quads`, `octets`, `bitquads` of
// codes. GPU: `sparse24`, `bitmap8` of plain values, `fragments`, `fragments24` of codes.
enum class Layout : std::uint8_t {
  tile = 0,
  csr = 1,
  sparse24 = 2,
  bitmap8 = 3,
  quads = 4,
  octets = 5,
  bitquads = 6,
  fragments = 7,
  fragments24 = 8,
};
constexpr int kLayouts = 9;

static constexpr bool is_cuda(Layout layout) {
  return layout == Layout::sparse24 || layout == Layout::bitmap8 || layout == Layout::fragments ||
         layout == Layout::fragments24;
}
static constexpr bool is_of_codes(Layout layout) {
  return layout >= Layout::quads;
}
// Whether every column has a code.
static constexpr bool is_dense(Layout layout) {
  return layout == Layout::quads || layout == Layout::fragments;
}
// Whether two of every four columns are kept, and the layout has no room for others.
static constexpr bool is_two_four(Layout layout) {
  return layout == Layout::sparse24 || layout == Layout::octets || layout == Layout::fragments24;
}
static constexpr const char* layout_name(Layout layout) {
  constexpr const char* names[kLayouts] = {"tile",   "csr",      "sparse24",  "bitmap8",    "quads",
                                           "octets", "bitquads", "fragments", "fragments24"};
  return names[static_cast<int>(layout)];
}

struct Packing {
  Layout layout;
  DType dtype;
  Encoding encoding;
  std::uint16_t group = 0;  // columns of the dense weight that share a scale; 0 for plain values
  DType scales{};           // their dtype
};

static constexpr bool operator==(const Packing& a, const Packing& b) {
  return a.layout == b.layout && a.dtype == b.dtype && a.encoding == b.encoding && a.group == b.group &&
         a.scales == b.scales;
}

// As one number: from the lowest byte on layout, dtype, encoding, two bytes of the group, the scales' dtype
// (sparseprune/kernels/packing.py).
static constexpr std::int64_t to_code(const Packing& p) {
  return static_cast<std::int64_t>(p.layout) | static_cast<std::int64_t>(p.dtype) << 8 |
         static_cast<std::int64_t>(p.encoding) << 16 | static_cast<std::int64_t>(p.group) << 24 |
         static_cast<std::int64_t>(p.scales) << 40;
}

// Numbers from outside to types; std::invalid_argument where nothing has such a number. header.cpp
DType to_dtype(int code);
Packing to_packing(std::int64_t code);
Matrix to_matrix(std::int64_t rows, std::int64_t cols, int dtype);

std::string describe(const Packing& packing);  // "float32 values in layout tile"

}  // namespace sparseprune
