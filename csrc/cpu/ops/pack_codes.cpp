// Runs once a layer: plain C++, parallel over tiles. 16 rows of codes begin at a whole byte, so that no two tiles share one; those
// that a bitmap keeps may not.
#include "cpu/ops/pack_codes.h"

#include <cstring>
#include <stdexcept>

#include "core/layouts/bitquads.h"
#include "core/layouts/octets.h"
#include "core/layouts/quads.h"
#include "cpu/ops/parallel.h"

namespace sparseprune {
namespace {

struct Codes {
  std::int64_t rows, cols, kpad;
  int bits;

  int mask() const {
    return (1 << bits) - 1;
  }
};

Codes codes_of(const PackedHeader& h, const Geometry& g) {
  return {h.rows, h.cols, g.kpad, static_cast<int>(value_bits(h.encoding, h.dtype))};
}
Codes codes_of(const PackedView& v) {
  return codes_of(v.header, v.geometry);
}

int code_at(const std::uint8_t* codes, int bits, std::int64_t i) {
  return bits == 8 ? codes[i] : codes[i / 2] >> (i % 2 * 4) & 15;
}
// Sets a nibble among zeros, or a byte.
void set_code(std::uint8_t* codes, int bits, std::int64_t i, int code) {
  if (bits == 8) {
    codes[i] = static_cast<std::uint8_t>(code);
  } else {
    codes[i / 2] = static_cast<std::uint8_t>(codes[i / 2] | code << (i % 2 * 4));
  }
}
void replace(std::uint8_t* byte, int mask, int shift, int value) {
  *byte = static_cast<std::uint8_t>((*byte & ~(mask << shift)) | value << shift);
}

// body(tile, rows in it, its first row)
template <typename Body>
void for_tiles(std::int64_t rows, int threads, const Body& body) {
  parallel_for(ceil_div(rows, codes::kRows), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t first = t * codes::kRows, left = rows - first;
      body(t, static_cast<int>(left < codes::kRows ? left : codes::kRows), first);
    }
  });
}
std::size_t code_bytes(const Codes& c, std::int64_t n) {
  return static_cast<std::size_t>(ceil_div(n * c.bits, 8));
}

// A mask's 2 columns of each 4, in order: visit(column, which of the two).
template <typename Visit>
void kept_columns(const Codes& c, const std::uint8_t* mask, const Visit& visit) {
  for (std::int64_t k = 0; k < c.cols; k += 4) {
    const unsigned four = mask[k / 8] >> (k % 8) & 15u;
    int nth = 0;
    for (unsigned bits = four; bits != 0; bits &= bits - 1) visit(k + __builtin_ctz(bits), nth++);
  }
}

void pack_quads(const Codes& c, const std::uint8_t* codes, std::uint8_t* values, int threads) {
  const std::int64_t bytes = quads::tile_bytes(c.bits, c.kpad);
  const int flip = c.bits == 8 ? 128 : 0;
  for_tiles(c.rows, threads, [&](std::int64_t t, int rows, std::int64_t first) {
    std::uint8_t* tile = values + t * bytes;
    std::memset(tile, quads::padding(c.bits), static_cast<std::size_t>(bytes));
    for (int r = 0; r < rows; ++r) {
      const std::int64_t row = (first + r) * c.cols;
      for (std::int64_t k = 0; k < c.cols; ++k) {
        const int code = code_at(codes, c.bits, row + k) ^ flip;
        replace(tile + quads::byte_of(c.bits, r, k), c.mask(), quads::shift_of(c.bits, k), code);
      }
    }
  });
}

void unpack_quads(const Codes& c, const std::uint8_t* values, std::uint8_t* codes, int threads) {
  const std::int64_t bytes = quads::tile_bytes(c.bits, c.kpad);
  const int flip = c.bits == 8 ? 128 : 0;
  for_tiles(c.rows, threads, [&](std::int64_t t, int rows, std::int64_t first) {
    const std::uint8_t* tile = values + t * bytes;
    std::memset(codes + first * c.cols * c.bits / 8, 0, code_bytes(c, rows * c.cols));
    for (int r = 0; r < rows; ++r) {
      const std::int64_t row = (first + r) * c.cols;
      for (std::int64_t k = 0; k < c.cols; ++k) {
        const int code = tile[quads::byte_of(c.bits, r, k)] >> quads::shift_of(c.bits, k) & c.mask();
        set_code(codes, c.bits, row + k, code ^ flip);
      }
    }
  });
}

void pack_octets(const Codes& c, const std::uint8_t* codes, const std::uint8_t* mask, std::uint8_t* values, int threads) {
  const std::int64_t stride = ceil_div(c.cols, 8);
  const std::int64_t bytes = octets::tile_bytes(c.bits, c.kpad), unit = octets::unit_bytes(c.bits);
  for_tiles(c.rows, threads, [&](std::int64_t t, int rows, std::int64_t first) {
    std::uint8_t* tile = values + t * bytes;
    for (std::int64_t u = 0; u < bytes; u += unit) {
      for (int i = 0; i < octets::kPlaces; ++i) tile[u + i] = i % 2 ? 0x55 : 0;
      std::memset(tile + u + octets::kPlaces, c.bits == 8 ? 0 : 0x88, static_cast<std::size_t>(unit - octets::kPlaces));
    }
    for (int r = 0; r < rows; ++r) {
      std::int64_t next = (first + r) * c.cols / 2;
      kept_columns(c, mask + (first + r) * stride, [&](std::int64_t k, int nth) {
        replace(tile + octets::place_byte(c.bits, r, k, nth), 3, octets::place_shift(k), static_cast<int>(k % 4));
        replace(tile + octets::value_byte(c.bits, r, k, nth), c.mask(), octets::value_shift(c.bits, k),
                code_at(codes, c.bits, next++));
      });
    }
  });
}

void unpack_octets_mask(const Codes& c, const std::uint8_t* values, std::uint8_t* mask, int threads) {
  const std::int64_t stride = ceil_div(c.cols, 8);
  const std::int64_t bytes = octets::tile_bytes(c.bits, c.kpad);
  for_tiles(c.rows, threads, [&](std::int64_t t, int rows, std::int64_t first) {
    const std::uint8_t* tile = values + t * bytes;
    std::memset(mask + first * stride, 0, static_cast<std::size_t>(rows * stride));
    for (int r = 0; r < rows; ++r) {
      std::uint8_t* bits = mask + (first + r) * stride;
      for (std::int64_t k = 0; k < c.cols; k += 4) {
        for (int nth = 0; nth < 2; ++nth) {
          const int place = tile[octets::place_byte(c.bits, r, k, nth)] >> octets::place_shift(k) & 3;
          bits[k / 8] = static_cast<std::uint8_t>(bits[k / 8] | 1 << (k % 8 + place));
        }
      }
    }
  });
}

void unpack_octets_codes(const Codes& c, const std::uint8_t* values, std::uint8_t* codes, int threads) {
  const std::int64_t bytes = octets::tile_bytes(c.bits, c.kpad);
  for_tiles(c.rows, threads, [&](std::int64_t t, int rows, std::int64_t first) {
    const std::uint8_t* tile = values + t * bytes;
    std::memset(codes + first * c.cols / 2 * c.bits / 8, 0, code_bytes(c, rows * (c.cols / 2)));
    for (int r = 0; r < rows; ++r) {
      std::int64_t next = (first + r) * c.cols / 2;
      for (std::int64_t k = 0; k < c.cols; k += 4) {
        for (int nth = 0; nth < 2; ++nth) {
          const int code = tile[octets::value_byte(c.bits, r, k, nth)] >> octets::value_shift(c.bits, k) & c.mask();
          set_code(codes, c.bits, next++, code);
        }
      }
    }
  });
}

// Walks the values of a tile of `bitquads`: visit(row in tile, byte of the value, its shift in there), in the order of the masks.
// Returns the byte behind them.
template <typename Byte, typename Visit>
Byte* walk_bitquads(int bits, const std::uint8_t* masks, std::int64_t kpad, Byte* values, const Visit& visit) {
  Byte* next[2] = {values, values};
  for (std::int64_t i = 0; i < kpad / 4; ++i) {
    const bool high = bits == 4 && bitquads::is_high(i);
    std::uint64_t mask;
    std::memcpy(&mask, masks + 8 * i, 8);
    for (; mask != 0; mask &= mask - 1) visit(__builtin_ctzll(mask) / 4, next[high]++, high ? 4 : 0);
  }
  return next[0] > next[1] ? next[0] : next[1];
}
// Between a code and what `bitquads` holds of it, a number with a sign.
int bitquads_flip(int bits) {
  return bits == 8 ? 0 : 8;
}

// Bytes of the values of a tile of `rows` rows; mask: of its first row.
std::int64_t bitquads_bytes(int code_bits, std::int64_t cols, const std::uint8_t* mask, int rows) {
  std::uint64_t is_high = 0;
  for (int i = 0; i < 16; ++i) is_high |= bitquads::is_high(i) ? std::uint64_t{15} << 4 * i : 0;
  const std::int64_t stride = ceil_div(cols, 8);
  std::int64_t low = 0, high = 0;
  for (int r = 0; r < rows; ++r) {
    for (std::int64_t at = 0; at < stride; at += 8) {
      std::uint64_t bits = 0;
      std::memcpy(&bits, mask + r * stride + at, static_cast<std::size_t>(stride - at < 8 ? stride - at : 8));
      low += __builtin_popcountll(bits & ~is_high);
      high += __builtin_popcountll(bits & is_high);
    }
  }
  return code_bits == 8 ? low + high : low > high ? low : high;
}

void pack_bitquads(const Codes& c, const Geometry& g, const Canonical& weight, std::uint8_t* blob, int threads) {
  const auto* codes = static_cast<const std::uint8_t*>(weight.values);
  const std::int64_t stride = ceil_div(c.cols, 8);
  auto* offsets = reinterpret_cast<std::int64_t*>(blob + g.offsets);
  std::memset(offsets, 0, static_cast<std::size_t>(g.index - g.offsets));
  for_tiles(c.rows, threads, [&](std::int64_t t, int rows, std::int64_t first) {
    offsets[t + 1] = bitquads_bytes(c.bits, c.cols, weight.bits + first * stride, rows);
  });
  for (std::int64_t t = 0; t < g.units; ++t) offsets[t + 1] += offsets[t];
  for_tiles(c.rows, threads, [&](std::int64_t t, int rows, std::int64_t first) {
    std::uint8_t* masks = blob + g.index + t * g.kpad * 2;
    std::memset(masks, 0, static_cast<std::size_t>(g.kpad) * 2);
    std::int64_t next[codes::kRows] = {};
    for (int r = 0; r < rows; ++r) {
      next[r] = weight.offsets[first + r];
      const std::uint8_t* bits = weight.bits + (first + r) * stride;
      for (std::int64_t k = 0; k < c.cols; k += 4)
        replace(masks + k * 2 + r / 2, 15, r % 2 * 4, bits[k / 8] >> (k % 8) & 15);
    }
    std::uint8_t* values = blob + g.values + offsets[t];
    std::memset(values, 0, static_cast<std::size_t>(offsets[t + 1] - offsets[t]));
    walk_bitquads(c.bits, masks, g.kpad, values, [&](int row, std::uint8_t* byte, int shift) {
      const int number = code_at(codes, c.bits, next[row]++) ^ bitquads_flip(c.bits);
      *byte = static_cast<std::uint8_t>(*byte | number << shift);
    });
  });
  const std::int64_t used = g.values + offsets[g.units];
  std::memset(blob + used, 0, static_cast<std::size_t>(g.scales - used));
}

void unpack_bitquads_mask(const Codes& c, const PackedView& v, std::uint8_t* mask, int threads) {
  const std::int64_t stride = ceil_div(c.cols, 8);
  for_tiles(c.rows, threads, [&](std::int64_t t, int rows, std::int64_t first) {
    const std::uint8_t* masks = static_cast<const std::uint8_t*>(v.index) + t * c.kpad * 2;
    std::memset(mask + first * stride, 0, static_cast<std::size_t>(rows * stride));
    for (int r = 0; r < rows; ++r) {
      std::uint8_t* bits = mask + (first + r) * stride;
      for (std::int64_t k = 0; k < c.cols; k += 4) {
        replace(bits + k / 8, 15, static_cast<int>(k % 8), masks[k * 2 + r / 2] >> (r % 2 * 4) & 15);
      }
    }
  });
}

// offsets: index of each row's first code.
void unpack_bitquads_codes(const Codes& c, const PackedView& v, const std::int64_t* offsets, std::uint8_t* codes,
                           int threads) {
  std::memset(codes, 0, code_bytes(c, v.header.nnz));
  for_tiles(c.rows, threads, [&](std::int64_t t, int rows, std::int64_t first) {
    std::int64_t next[codes::kRows] = {};
    for (int r = 0; r < rows; ++r) next[r] = offsets[first + r];
    const std::int64_t begin = offsets[first] / 2, end = offsets[first + rows] / 2;  // bytes that other tiles may share
    const auto* masks = static_cast<const std::uint8_t*>(v.index) + t * c.kpad * 2;
    const auto* values = static_cast<const std::uint8_t*>(v.values) + v.offsets[t];
    walk_bitquads(c.bits, masks, c.kpad, values, [&](int row, const std::uint8_t* byte, int shift) {
      const std::int64_t at = next[row]++;
      if (c.bits == 8) {
        codes[at] = *byte;
        return;
      }
      const auto nibble = static_cast<std::uint8_t>(((*byte >> shift & 15) ^ bitquads_flip(4)) << (at % 2 * 4));
      if (at / 2 == begin || at / 2 == end) {
        __atomic_fetch_or(codes + at / 2, nibble, __ATOMIC_RELAXED);
      } else {
        codes[at / 2] = static_cast<std::uint8_t>(codes[at / 2] | nibble);
      }
    });
  });
}

void pack_scales(std::int64_t rows, std::int64_t groups, std::int64_t padded_groups, const std::uint16_t* scales,
                 std::uint16_t* packed, int threads) {
  for_tiles(rows, threads, [&](std::int64_t t, int n, std::int64_t first) {
    std::uint16_t* tile = packed + t * padded_groups * codes::kRows;
    std::memset(tile, 0, static_cast<std::size_t>(padded_groups * codes::kRows) * 2);
    for (int r = 0; r < n; ++r) {
      for (std::int64_t g = 0; g < groups; ++g) tile[g * codes::kRows + r] = scales[(first + r) * groups + g];
    }
  });
}

void unpack_scales(std::int64_t rows, std::int64_t groups, std::int64_t padded_groups, const std::uint16_t* packed,
                   std::uint16_t* scales, int threads) {
  for_tiles(rows, threads, [&](std::int64_t t, int n, std::int64_t first) {
    const std::uint16_t* tile = packed + t * padded_groups * codes::kRows;
    for (int r = 0; r < n; ++r) {
      for (std::int64_t g = 0; g < groups; ++g) scales[(first + r) * groups + g] = tile[g * codes::kRows + r];
    }
  });
}

}  // namespace

std::int64_t stored_codes(std::int64_t rows, std::int64_t cols, const Packing& packing, const std::uint8_t* mask) {
  if (packing.layout != Layout::bitquads || rows <= 0 || cols <= 0) return 0;
  if (mask == nullptr) throw std::invalid_argument("mask: must be there, layout bitquads depends on it; pass the weight's");
  const int bits = static_cast<int>(value_bits(packing.encoding, packing.dtype));
  std::int64_t bytes = 0;
  for (std::int64_t first = 0; first < rows; first += codes::kRows) {
    const std::int64_t left = rows - first;
    const int there = static_cast<int>(left < codes::kRows ? left : codes::kRows);
    bytes += bitquads_bytes(bits, cols, mask + first * ceil_div(cols, 8), there);
  }
  return bytes;
}

void pack_codes(const PackedHeader& h, const Geometry& g, const Canonical& weight, std::uint8_t* blob, int threads) {
  const Codes c = codes_of(h, g);
  const auto* codes = static_cast<const std::uint8_t*>(weight.values);
  if (h.layout == Layout::quads) {
    pack_quads(c, codes, blob + g.values, threads);
  } else if (h.layout == Layout::bitquads) {
    pack_bitquads(c, g, weight, blob, threads);
  } else {
    pack_octets(c, codes, weight.bits, blob + g.values, threads);
  }
  const std::int64_t groups = ceil_div(h.cols, h.group), padded = codes::groups(g.kpad, packing_of(h));
  const std::int64_t bytes = g.units * padded * codes::kRows * 2;
  pack_scales(h.rows, groups, padded, weight.scales, reinterpret_cast<std::uint16_t*>(blob + g.scales), threads);
  std::memset(blob + g.scales + bytes, 0, static_cast<std::size_t>((g.minimums ? g.minimums : g.total) - g.scales - bytes));
  if (g.minimums) {
    pack_scales(h.rows, groups, padded, weight.minimums, reinterpret_cast<std::uint16_t*>(blob + g.minimums), threads);
    std::memset(blob + g.minimums + bytes, 0, static_cast<std::size_t>(g.total - g.minimums - bytes));
  }
}

void unpack_codes(const PackedView& v, const std::int64_t* offsets, std::uint8_t* codes, int threads) {
  const auto* values = static_cast<const std::uint8_t*>(v.values);
  if (v.header.layout == Layout::quads) {
    unpack_quads(codes_of(v), values, codes, threads);
  } else if (v.header.layout == Layout::bitquads) {
    unpack_bitquads_codes(codes_of(v), v, offsets, codes, threads);
  } else {
    unpack_octets_codes(codes_of(v), values, codes, threads);
  }
}

void unpack_code_bits(const PackedView& v, std::uint8_t* bits, int threads) {
  if (v.header.layout == Layout::bitquads) return unpack_bitquads_mask(codes_of(v), v, bits, threads);
  if (v.header.layout != Layout::octets) {
    throw std::invalid_argument("packed: holds " + describe(packing_of(v.header)) +
                                ", which keeps every entry and has no bits");
  }
  unpack_octets_mask(codes_of(v), static_cast<const std::uint8_t*>(v.values), bits, threads);
}

void unpack_code_scales(const PackedView& v, const std::uint8_t* blob, std::uint16_t* scales, std::uint16_t* minimums,
                        int threads) {
  const PackedHeader& h = v.header;
  const std::int64_t groups = ceil_div(h.cols, h.group), padded = codes::groups(v.geometry.kpad, packing_of(h));
  const auto at = [&](std::int64_t section) { return reinterpret_cast<const std::uint16_t*>(blob + section); };
  unpack_scales(h.rows, groups, padded, at(v.geometry.scales), scales, threads);
  if (v.geometry.minimums) unpack_scales(h.rows, groups, padded, at(v.geometry.minimums), minimums, threads);
}

}  // namespace sparseprune
