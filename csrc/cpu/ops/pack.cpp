// Runs once a layer: plain C++.
#include "cpu/ops/pack.h"

#include <cstring>
#include <stdexcept>

#include "core/layouts/csr.h"
#include "core/layouts/tile.h"
#include "cpu/dispatch/isa.h"
#include "cpu/ops/pack_codes.h"
#include "cpu/ops/parallel.h"

namespace sparseprune {
namespace {

PackedHeader header_for(std::int64_t rows, std::int64_t cols, const Packing& packing, std::int64_t nnz,
                        const std::uint8_t* bits) {
  const bool pairs = packing.dtype == DType::bf16 && packing.layout == Layout::tile;
  const std::int64_t stored = stored_codes(rows, cols, packing, bits);
  return make_header(Home::cpu, rows, cols, packing, nnz, stored, pairs ? kernels().bf16_interleave : 1);
}

// Bit i of x to bit 2i.
constexpr std::uint32_t spread(std::uint32_t x) {
  x = (x | x << 8) & 0x00ff00ffu;
  x = (x | x << 4) & 0x0f0f0f0fu;
  x = (x | x << 2) & 0x33333333u;
  return (x | x << 1) & 0x55555555u;
}
constexpr std::uint32_t gather_even(std::uint32_t x) {
  x &= 0x55555555u;
  x = (x | x >> 1) & 0x33333333u;
  x = (x | x >> 2) & 0x0f0f0f0fu;
  x = (x | x >> 4) & 0x00ff00ffu;
  return (x | x >> 8) & 0xffffu;
}

// One bit per row for the 8 columns of byte `byte`: masks[j] bit r = row r keeps column 8 * byte + j.
void column_masks(const std::uint8_t* bits, std::int64_t stride, int rows, std::int64_t byte, std::uint16_t* masks) {
  std::uint32_t m[8] = {};
  for (int r = 0; r < rows; ++r) {
    const unsigned b = bits[r * stride + byte];
    for (int j = 0; j < 8; ++j) m[j] |= (b >> j & 1u) << r;
  }
  for (int j = 0; j < 8; ++j) masks[j] = static_cast<std::uint16_t>(m[j]);
}

// Walks the values of a tile in packed order: visit(row in tile) once a value. Masks are single or paired columns.
template <typename Visit>
void walk_tile(const std::uint16_t* masks, std::int64_t kpad, int interleave, const Visit& visit) {
  for (std::int64_t k = 0; k < kpad; k += interleave) {
    if (interleave == 1) {
      for (std::uint32_t m = masks[k]; m != 0; m &= m - 1) visit(__builtin_ctz(m));
    } else {
      std::uint32_t m;
      std::memcpy(&m, masks + k, 4);
      for (; m != 0; m &= m - 1) visit(__builtin_ctz(m) / 2);
    }
  }
}

int rows_in_tile(std::int64_t rows, std::int64_t tile) {
  const std::int64_t left = rows - tile * kTileRows;
  return static_cast<int>(left < kTileRows ? left : kTileRows);
}

template <typename W>
void pack_tiles(const PackedHeader& h, const Geometry& g, const Canonical& weight, std::uint8_t* blob, int threads) {
  const auto* values = static_cast<const W*>(weight.values);
  const std::uint8_t* bits = weight.bits;
  const std::int64_t* offsets = weight.offsets;
  auto* tile_offsets = reinterpret_cast<std::int64_t*>(blob + g.offsets);
  auto* all_masks = reinterpret_cast<std::uint16_t*>(blob + g.index);
  W* out = reinterpret_cast<W*>(blob + g.values);
  const std::int64_t stride = ceil_div(h.cols, 8);
  for (std::int64_t t = 0; t < g.units; ++t) tile_offsets[t] = offsets[t * kTileRows];
  tile_offsets[g.units] = h.nnz;
  parallel_for(g.units, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const int rows = rows_in_tile(h.rows, t);
      std::uint16_t* masks = all_masks + t * g.kpad;
      std::memset(masks, 0, static_cast<std::size_t>(g.kpad) * 2);
      for (std::int64_t i = 0; i < stride; ++i) column_masks(bits + t * kTileRows * stride, stride, rows, i, masks + 8 * i);
      if (h.interleave == 2) {
        for (std::int64_t k = 0; k < g.kpad; k += 2) {
          const std::uint32_t pair = spread(masks[k]) | spread(masks[k + 1]) << 1;
          std::memcpy(masks + k, &pair, 4);
        }
      }
      const W* next[kTileRows];
      for (int r = 0; r < rows; ++r) next[r] = values + offsets[t * kTileRows + r];
      W* y = out + tile_offsets[t];
      walk_tile(masks, g.kpad, h.interleave, [&](int r) { *y++ = *next[r]++; });
    }
  });
}

template <typename W>
void unpack_tiles(const PackedView& v, const std::int64_t* offsets, W* values, int threads) {
  const auto* all_masks = static_cast<const std::uint16_t*>(v.index);
  const W* x = static_cast<const W*>(v.values);
  parallel_for(v.geometry.units, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      W* next[kTileRows];
      for (int r = 0; r < rows_in_tile(v.header.rows, t); ++r) next[r] = values + offsets[t * kTileRows + r];
      const W* y = x + v.offsets[t];
      walk_tile(all_masks + t * v.geometry.kpad, v.geometry.kpad, v.header.interleave, [&](int r) { *next[r]++ = *y++; });
    }
  });
}

template <typename C>
void pack_columns(const PackedHeader& h, const std::uint8_t* bits, const std::int64_t* offsets, C* columns, int threads) {
  const std::int64_t stride = ceil_div(h.cols, 8);
  parallel_for(h.rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      C* out = columns + offsets[r];
      for (std::int64_t i = 0; i < stride; ++i) {
        for (unsigned b = bits[r * stride + i]; b != 0; b &= b - 1) *out++ = static_cast<C>(8 * i + __builtin_ctz(b));
      }
    }
  });
}

template <typename C>
void unpack_columns(const PackedView& v, std::uint8_t* bits, int threads) {
  const std::int64_t stride = ceil_div(v.header.cols, 8);
  const C* columns = static_cast<const C*>(v.index);
  parallel_for(v.header.rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      std::uint8_t* row = bits + r * stride;
      std::memset(row, 0, static_cast<std::size_t>(stride));
      for (std::int64_t i = v.offsets[r]; i < v.offsets[r + 1]; ++i) {
        const std::int64_t c = columns[i];
        row[c / 8] = static_cast<std::uint8_t>(row[c / 8] | 1u << (c % 8));
      }
    }
  });
}

}  // namespace

PackedView view_packed(const std::uint8_t* blob, std::int64_t size) {
  PackedView v{};
  v.header = read_header(Home::cpu, blob, size);
  v.geometry = geometry_of(v.header);
  v.offsets = reinterpret_cast<const std::int64_t*>(blob + v.geometry.offsets);
  v.index = blob + v.geometry.index;
  v.values = blob + v.geometry.values;
  return v;
}

std::int64_t packed_bytes(std::int64_t rows, std::int64_t cols, const Packing& packing, std::int64_t nnz,
                          const std::uint8_t* bits) {
  return geometry_of(header_for(rows, cols, packing, nnz, bits)).total;
}

void pack(std::int64_t rows, std::int64_t cols, const Packing& packing, const Canonical& weight, std::uint8_t* blob,
          int threads) {
  const PackedHeader h = header_for(rows, cols, packing, weight.offsets ? weight.offsets[rows] : 0, weight.bits);
  const Geometry g = geometry_of(h);
  std::memcpy(blob, &h, sizeof h);
  if (is_of_codes(h.layout)) return pack_codes(h, g, weight, blob, threads);
  // Padding between sections and the tail: defined bytes, so that equal weights make equal blobs.
  std::memset(blob + g.offsets, 0, static_cast<std::size_t>(g.index - g.offsets));
  const std::int64_t value_bytes = g.total - kTailBytes - g.values;
  std::memset(blob + g.values + value_bytes, 0, static_cast<std::size_t>(kTailBytes));
  if (h.layout == Layout::csr) {
    std::memcpy(blob + g.offsets, weight.offsets, static_cast<std::size_t>(h.rows + 1) * 8);
    const std::int64_t used = h.nnz * csr_column_bytes(h.cols);
    std::memset(blob + g.index + used, 0, static_cast<std::size_t>(g.values - g.index - used));
    if (csr_column_bytes(h.cols) == 2) {
      pack_columns(h, weight.bits, weight.offsets, reinterpret_cast<std::uint16_t*>(blob + g.index), threads);
    } else {
      pack_columns(h, weight.bits, weight.offsets, reinterpret_cast<std::int32_t*>(blob + g.index), threads);
    }
    std::memcpy(blob + g.values, weight.values, static_cast<std::size_t>(value_bytes));
  } else {
    const std::int64_t used = g.units * g.kpad * 2;
    std::memset(blob + g.index + used, 0, static_cast<std::size_t>(g.values - g.index - used));
    if (value_bits(h.encoding, h.dtype) == 16) {
      pack_tiles<std::uint16_t>(h, g, weight, blob, threads);
    } else {
      pack_tiles<std::uint32_t>(h, g, weight, blob, threads);
    }
  }
}

void unpack_bits(const std::uint8_t* blob, std::int64_t size, std::uint8_t* bits, int threads) {
  const PackedView v = view_packed(blob, size);
  if (is_of_codes(v.header.layout)) return unpack_code_bits(v, bits, threads);
  if (v.header.layout == Layout::csr) {
    if (csr_column_bytes(v.header.cols) == 2) {
      unpack_columns<std::uint16_t>(v, bits, threads);
    } else {
      unpack_columns<std::int32_t>(v, bits, threads);
    }
    return;
  }
  const std::int64_t stride = ceil_div(v.header.cols, 8);
  const auto* all_masks = static_cast<const std::uint16_t*>(v.index);
  parallel_for(v.geometry.units, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const std::uint16_t* masks = all_masks + t * v.geometry.kpad;
      const int rows = rows_in_tile(v.header.rows, t);
      for (std::int64_t i = 0; i < stride; ++i) {
        std::uint16_t m[8];
        std::memcpy(m, masks + 8 * i, sizeof m);
        if (v.header.interleave == 2) {
          for (int j = 0; j < 8; j += 2) {
            std::uint32_t pair;
            std::memcpy(&pair, m + j, 4);
            m[j] = static_cast<std::uint16_t>(gather_even(pair));
            m[j + 1] = static_cast<std::uint16_t>(gather_even(pair >> 1));
          }
        }
        for (int r = 0; r < rows; ++r) {
          unsigned byte = 0;
          for (int j = 0; j < 8; ++j) byte |= (m[j] >> r & 1u) << j;
          bits[(t * kTileRows + r) * stride + i] = static_cast<std::uint8_t>(byte);
        }
      }
    }
  });
}

void unpack_values(const std::uint8_t* blob, std::int64_t size, const std::int64_t* offsets, void* values, int threads) {
  const PackedView v = view_packed(blob, size);
  if (is_of_codes(v.header.layout)) return unpack_codes(v, offsets, static_cast<std::uint8_t*>(values), threads);
  if (v.header.layout == Layout::csr) {
    std::memcpy(values, v.values, static_cast<std::size_t>(v.geometry.total - kTailBytes - v.geometry.values));
  } else if (value_bits(v.header.encoding, v.header.dtype) == 16) {
    unpack_tiles(v, offsets, static_cast<std::uint16_t*>(values), threads);
  } else {
    unpack_tiles(v, offsets, static_cast<std::uint32_t*>(values), threads);
  }
}

void unpack_scales(const std::uint8_t* blob, std::int64_t size, std::uint16_t* scales, std::uint16_t* minimums,
                   int threads) {
  const PackedView v = view_packed(blob, size);
  if (!is_of_codes(v.header.layout)) {
    throw std::invalid_argument("packed: holds " + describe(packing_of(v.header)) + ", which has no scales");
  }
  unpack_code_scales(v, blob, scales, minimums, threads);
}

}  // namespace sparseprune
