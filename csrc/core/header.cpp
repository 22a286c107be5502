#include "core/header.h"

#include <cstddef>
#include <cstring>
#include <stdexcept>

#include "core/layouts/bitmap8.h"
#include "core/layouts/bitquads.h"
#include "core/layouts/csr.h"
#include "core/layouts/fragments.h"
#include "core/layouts/octets.h"
#include "core/layouts/quads.h"
#include "core/layouts/sparse24.h"
#include "core/layouts/tile.h"

namespace sparseprune {
namespace {

constexpr char kMagic[9] = "sparsepr";

// Each step is a bijection of the sum, so a change within one word always shows.
std::uint64_t checksum_of(const PackedHeader& header) {
  std::uint64_t words[offsetof(PackedHeader, checksum) / 8];
  std::memcpy(words, &header, sizeof words);
  std::uint64_t sum = 0xcbf29ce484222325u;  // the constants of FNV-1a
  for (const std::uint64_t word : words) sum = (sum ^ word) * 0x100000001b3u;
  return sum;
}

// Sums and products of such sides do not overflow.
bool is_sane(std::int64_t rows, std::int64_t cols) {
  constexpr std::int64_t kMax = std::int64_t{1} << 40;
  return rows >= 0 && cols >= 0 && rows < kMax && cols < kMax && (cols == 0 || rows < kMax / cols);
}

bool is_known(const Packing& p) {
  return static_cast<int>(p.layout) < kLayouts && static_cast<int>(p.dtype) < kDTypes &&
         static_cast<int>(p.encoding) < kEncodings && has_scales(p.encoding, p.group, p.scales) &&
         is_of_codes(p.layout) == (p.encoding != Encoding::plain) && (is_dense(p.layout) || !has_minimums(p.encoding)) &&
         (p.layout != Layout::sparse24 || value_bits(p.encoding, p.dtype) == sparse24::kBits) &&
         !(is_cuda(p.layout) && is_of_codes(p.layout) && p.dtype == DType::f32);
}

std::int64_t value_bytes(const Packing& p, std::int64_t count) {
  return ceil_div(count * value_bits(p.encoding, p.dtype), 8);
}

// What a blob keeps; bitmap8 and bitquads alone have their own number of it.
std::int64_t stored_in(const PackedHeader& h, std::int64_t stored) {
  switch (h.layout) {
    case Layout::tile:
    case Layout::csr:
    case Layout::quads:
    case Layout::octets:
    case Layout::fragments:
    case Layout::fragments24: return h.nnz;
    case Layout::sparse24: return sparse24::units(h.rows, h.cols) * sparse24::kValues;
    case Layout::bitmap8:
    case Layout::bitquads: return stored;
  }
  return 0;
}

// The number of values where the layout decides it.
std::int64_t nnz_in(const PackedHeader& h, std::int64_t nnz) {
  if (is_dense(h.layout)) return h.rows * h.cols;
  return is_two_four(h.layout) && is_of_codes(h.layout) ? h.rows * (h.cols / 2) : nnz;
}

// Codes of whole groups of four: that of plain 2:4 values is checked where they are packed.
bool holds(Layout layout, std::int64_t cols) {
  return cols % 4 == 0 || !(is_two_four(layout) && is_of_codes(layout));
}

std::string shape(std::int64_t rows, std::int64_t cols) {
  return std::to_string(rows) + "x" + std::to_string(cols);
}

}  // namespace

DType to_dtype(int code) {
  if (code < 0 || code >= kDTypes) throw std::invalid_argument("dtype: must be 0, 1 or 2, got " + std::to_string(code));
  return static_cast<DType>(code);
}

Packing to_packing(std::int64_t code) {
  const Packing p{static_cast<Layout>(code & 0xff), static_cast<DType>(code >> 8 & 0xff),
                  static_cast<Encoding>(code >> 16 & 0xff), static_cast<std::uint16_t>(code >> 24 & 0xffff),
                  static_cast<DType>(code >> 40 & 0xff)};
  if (!is_known(p) || to_code(p) != code) {
    throw std::invalid_argument("packing: must be a number that packing() gives, got " + std::to_string(code));
  }
  return p;
}

Matrix to_matrix(std::int64_t rows, std::int64_t cols, int dtype) {
  if (rows < 0 || cols < 0) throw std::invalid_argument("shape: must not be negative, got " + shape(rows, cols));
  return {rows, cols, to_dtype(dtype)};
}

std::string describe(const Packing& p) {
  const std::string values = p.encoding == Encoding::plain ? "" : std::string(encoding_name(p.encoding)) + " ";
  return std::string(dtype_name(p.dtype)) + " " + values + "in layout " + layout_name(p.layout);
}

PackedHeader make_header(Home home, std::int64_t rows, std::int64_t cols, const Packing& packing, std::int64_t nnz,
                         std::int64_t stored, int interleave) {
  if (is_cuda(packing.layout) != (home == Home::cuda)) {
    throw std::invalid_argument(std::string("layout: ") + layout_name(packing.layout) + " is not one of " +
                                (home == Home::cuda ? "a GPU" : "the CPU"));
  }
  if (!is_sane(rows, cols))
    throw std::invalid_argument("shape: must be of less than 2^40 entries, got " + shape(rows, cols));
  if (!holds(packing.layout, cols)) {
    throw std::invalid_argument(std::string("cols: must be a multiple of 4 for layout ") + layout_name(packing.layout) +
                                ", got " + std::to_string(cols));
  }
  PackedHeader h{};
  std::memcpy(h.magic, kMagic, sizeof h.magic);
  h.version = kPackedVersion;
  h.layout = packing.layout;
  h.dtype = packing.dtype;
  h.encoding = packing.encoding;
  h.group = packing.group;
  h.scales = packing.scales;
  h.interleave = static_cast<std::uint8_t>(interleave);
  h.rows = rows;
  h.cols = cols;
  h.nnz = nnz_in(h, nnz);
  h.stored = stored_in(h, stored);
  h.checksum = checksum_of(h);
  return h;
}

Geometry geometry_of(const PackedHeader& h) {
  const std::int64_t bytes = value_bytes(packing_of(h), h.stored);
  switch (h.layout) {
    case Layout::tile: return tile_geometry(h.rows, h.cols, bytes);
    case Layout::csr: return csr_geometry(h.rows, h.cols, h.nnz, bytes);
    case Layout::sparse24: return sparse24::geometry(h.rows, h.cols, bytes);
    case Layout::bitmap8: return bitmap8::geometry(h.rows, h.cols, bytes);
    case Layout::quads: return quads::geometry(h.rows, h.cols, packing_of(h));
    case Layout::octets: return octets::geometry(h.rows, h.cols, packing_of(h));
    case Layout::bitquads: return bitquads::geometry(h.rows, h.cols, h.stored, packing_of(h));
    case Layout::fragments:
    case Layout::fragments24: return fragments::geometry(h.rows, h.cols, packing_of(h));
  }
  return {};
}

PackedHeader read_header(Home home, const void* begin, std::int64_t size) {
  if (size < kHeaderBytes) {
    throw std::invalid_argument("packed: must hold a header of 64 bytes, got " + std::to_string(size) +
                                " bytes; make packed weights with ops.pack");
  }
  PackedHeader h;
  std::memcpy(&h, begin, sizeof h);
  if (std::memcmp(h.magic, kMagic, sizeof h.magic) != 0 || h.version != kPackedVersion) {
    throw std::invalid_argument("packed: not a packed weight of version " + std::to_string(kPackedVersion) +
                                "; make packed weights with ops.pack");
  }
  if (h.checksum != checksum_of(h)) {
    throw std::invalid_argument("packed: the header is damaged; pack the weight again");
  }
  const Packing packing = packing_of(h);
  if (is_known(packing) && is_cuda(h.layout) != (home == Home::cuda)) {
    throw std::invalid_argument(std::string("packed: holds a weight packed for ") +
                                (home == Home::cuda ? "the CPU" : "CUDA") +
                                "; move the layer with .to(device), not its buffer alone");
  }
  constexpr std::int64_t kMax = std::int64_t{1} << 40;
  const bool sane = is_known(packing) && is_sane(h.rows, h.cols) && h.nnz >= 0 && h.nnz < kMax && h.stored >= 0 &&
                    h.stored < kMax && (h.interleave == 1 || h.interleave == 2) && h.stored == stored_in(h, h.stored) &&
                    h.nnz == nnz_in(h, h.nnz) && holds(h.layout, h.cols);
  if (!sane || geometry_of(h).total != size) {
    throw std::invalid_argument("packed: the header does not fit the size of " + std::to_string(size) +
                                " bytes; the weight is damaged, pack it again");
  }
  return h;
}

void require_same(const PackedHeader& h, std::int64_t rows, std::int64_t cols, const Packing& packing) {
  if (h.rows == rows && h.cols == cols && packing_of(h) == packing) return;
  throw std::invalid_argument("packed: holds a weight of " + shape(h.rows, h.cols) + " " + describe(packing_of(h)) +
                              ", the call is for " + shape(rows, cols) + " " + describe(packing) +
                              "; pass the shape and the packing that ops.pack gave");
}

HiddenBlob require_hidden(std::int64_t rows, std::int64_t cols, const Packing& packing, std::uintptr_t blob,
                          std::int64_t size) {
  const auto refuse = [&](const std::string& why) -> std::invalid_argument {
    return std::invalid_argument("packed: holds no weight of " + shape(rows, cols) + " " + describe(packing) + why);
  };
  const std::string by_size = " (its size is " + std::to_string(size) + " bytes)";
  if (!is_cuda(packing.layout))
    throw refuse(", which is for the CPU; move the layer with .to(device), not its buffer alone");
  const std::int64_t bits = value_bits(packing.encoding, packing.dtype);
  if (!is_sane(rows, cols)) throw refuse(by_size);
  PackedHeader h = make_header(Home::cuda, rows, cols, packing, 0);
  if (packing.layout == Layout::bitmap8) {
    const Geometry empty = geometry_of(h);
    h.stored = (size - empty.values) * 8 / bits;
    const std::int64_t most = empty.units * bitmap8::kRows * bitmap8::kCols + kAlign * 8 / bits;
    if (h.stored < 0 || h.stored > most) throw refuse(by_size);
  }
  const Geometry g = geometry_of(h);
  if (g.total != size) throw refuse(by_size + "; pass the shape and the packing that ops.pack gave");
  if (blob % 16 != 0) {
    throw std::invalid_argument("packed: must begin at a multiple of 16 bytes, as ops.pack makes it; clone it");
  }
  return {g, h.stored};
}

}  // namespace sparseprune
