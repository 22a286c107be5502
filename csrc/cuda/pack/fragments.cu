// int8 and int4 codes to the units of layouts fragments and fragments24, back, and rows of them looked up.
//
// Layouts   codes: those of the kept entries, row-major, int8 or two int4 to a byte, so that a byte may hold the ends of two
//           rows; mask [rows, ceil(cols / 8)], of 2:4 weights; scales and minimums 16 bits [rows, groups]; units as
//           core/layouts/fragments.h lays them out. "columns" of a unit: those that have codes.
// Needs     units at 16 bytes; of 2:4, cols % 4 == 0.
// Partition pack: a warp a unit; each lane gathers what it stores, 16 bytes of codes, 8 of places, a scale of each set.
//           unpack: a thread a byte of codes, a byte of the mask, a scale. lookup: a warp a block of 64 columns of a row, two
//           neighbours a lane: a row's codes of a unit are 4 lanes' words, so that half of each sector is read.
// Constants A layer is packed once and its codes are a quarter of its dense size: these kernels are plain. Lookups move a few
//           rows of a table.
#include <limits>
#include <stdexcept>
#include <string>

#include "core/layouts/fragments.h"
#include "cuda/chunks.cuh"
#include "cuda/words.cuh"

namespace sparseprune::cuda {
namespace {

using fragments::kCols;
using fragments::kRows;

struct Codes {
  fragments::Unit unit;
  std::int64_t rows, cols, stored;  // stored: columns of a row that have codes
  std::int64_t groups, stride;      // of a row: scales, and bytes of the mask
  std::int64_t blocks, all;         // units side by side, and in all
  int group;
  bool f16_scales;
};

Codes codes_of(const Packing& p, std::int64_t rows, std::int64_t cols) {
  const fragments::Unit unit = fragments::unit_of(p);
  const std::int64_t blocks = fragments::blocks(cols);
  return {unit,
          rows,
          cols,
          unit.two_four ? cols / 2 : cols,
          ceil_div(cols, p.group),
          ceil_div(cols, 8),
          blocks,
          ceil_div(rows, kRows) * blocks,
          p.group,
          p.scales == DType::f16};
}

// Code i of all; int8 as the code + 128, as units have it.
template <int BITS>
SP_DEVICE std::uint32_t code_at(Global<const std::uint8_t> codes, std::int64_t i) {
  const std::uint32_t byte = load<std::uint8_t>(codes + i * BITS / 8);
  return BITS == 8 ? byte ^ 128u : byte >> (i % 2 * 4) & 15u;
}

// Where a unit has its places, and where a set of scales.
SP_DEVICE std::int64_t place_byte(const Codes& c, int word) {
  return c.unit.code_bytes() + 4 * word;
}
SP_DEVICE std::int64_t set_byte(const Codes& c, int set, int row) {
  return c.unit.sets_begin() + set * c.unit.set_bytes() + 2 * fragments::scale_index(row);
}
// The group that a set of a block is the scales of.
SP_DEVICE std::int64_t group_of(const Codes& c, std::int64_t block, int set) {
  return (block * kCols + set * (kCols / 2)) / c.group;
}

// Word `word` of a lane's codes, row0 and col0 being the unit's first.
template <int BITS>
SP_DEVICE std::uint32_t gather_word(const Codes& c, Global<const std::uint8_t> codes, std::int64_t row0, std::int64_t col0,
                                    int word) {
  std::uint32_t v = 0;
  SP_UNROLL
  for (int nth = 0; nth < 32 / BITS; ++nth) {
    const fragments::Place at = fragments::place_of(BITS, lane_id(), word, nth);
    const std::int64_t row = row0 + at.row, col = col0 + at.col;
    const bool inside = row < c.rows && col < c.stored;
    const std::uint32_t code = inside ? code_at<BITS>(codes, row * c.stored + col) : fragments::zero_code(BITS);
    v |= code << (nth * BITS);
  }
  return v;
}

// A lane's word of metadata for a step: the nibbles of 4 chunks of two rows.
SP_DEVICE std::uint32_t gather_places(const Codes& c, Global<const std::uint8_t> mask, std::int64_t row0, std::int64_t block,
                                      int step) {
  const int tile = lane_id() % 4 / 2, half = lane_id() % 2;
  std::uint32_t v = 0;
  SP_UNROLL
  for (int i = 0; i < 8; ++i) {
    const int row = tile * 16 + i / 4 * 8 + lane_id() / 4, chunk = step * 8 + half * 4 + i % 4;
    const std::int64_t col = block * kCols + 4 * chunk;
    const bool inside = row0 + row < c.rows && col < c.cols;
    const unsigned kept = inside ? load<std::uint8_t>(mask + ((row0 + row) * c.stride + col / 8)) >> (col % 8) & 15u : 0u;
    v |= (static_cast<std::uint32_t>(kNibbles >> (4 * kept)) & 15u) << sparse24::word_shift(row, chunk);
  }
  return v;
}
static_assert(sparse24::word_index(17, 5) == (4 * 1 + 2 * 1 + 1) * 2, "a lane's words: row % 8, tile, half of the chunks");

template <int BITS>
SP_KERNEL SP_THREADS(kThreads, 1) fragments_pack_kernel(Codes c, Global<const std::uint8_t> codes,
                                                        Global<const std::uint8_t> mask, Global<const std::uint16_t> scales,
                                                        Global<const std::uint16_t> minimums, Global<std::uint8_t> units) {
  for (std::int64_t u = first_task(); u < c.all; u += task_step()) {
    const std::int64_t row0 = u / c.blocks * kRows, block = u % c.blocks;
    const std::int64_t col0 = block * c.unit.cols();
    const auto unit = units + u * c.unit.bytes();
    for (int chunk = 0; chunk < c.unit.words() / 4; ++chunk) {
      std::uint32_t w[4];
      SP_UNROLL
      for (int i = 0; i < 4; ++i) w[i] = gather_word<BITS>(c, codes, row0, col0, 4 * chunk + i);
      store(unit + (chunk * 32 + lane_id()) * 16, u32x4{w[0], w[1], w[2], w[3]});
    }
    if (c.unit.two_four) {
      store(unit + place_byte(c, 2 * lane_id()),
            u32x2{gather_places(c, mask, row0, block, 0), gather_places(c, mask, row0, block, 1)});
    }
    const std::int64_t row = row0 + lane_id();
    for (int set = 0; set < c.unit.sets; ++set) {
      const std::int64_t group = group_of(c, block, set), from = row * c.groups + group;
      const bool inside = row < c.rows && group < c.groups;
      const std::int64_t at = set_byte(c, set, lane_id());
      store(reinterpret<std::uint16_t>(unit + at), inside ? load<std::uint16_t>(scales + from) : std::uint16_t{0});
      if (c.unit.minimums) {
        store(reinterpret<std::uint16_t>(unit + (at + fragments::kSetBytes)),
              inside ? load<std::uint16_t>(minimums + from) : std::uint16_t{0});
      }
    }
  }
}

// Where the unit of a row and a block of columns begins.
SP_DEVICE std::int64_t unit_byte(const Codes& c, std::int64_t row, std::int64_t block) {
  return (row / kRows * c.blocks + block) * c.unit.bytes();
}

// A code as it stands in its unit. col: of those that have codes.
template <int BITS>
SP_DEVICE std::uint32_t packed_code(const Codes& c, Global<const std::uint8_t> units, std::int64_t row, std::int64_t col) {
  const int in_row = static_cast<int>(row % kRows), in_col = static_cast<int>(col % c.unit.cols());
  const std::int64_t at = unit_byte(c, row, col / c.unit.cols()) + fragments::code_byte(BITS, in_row, in_col);
  return load<std::uint8_t>(units + at) >> fragments::code_shift(BITS, in_row) & ((1u << BITS) - 1);
}

template <int BITS>
SP_KERNEL SP_THREADS(kThreads, 1)
    fragments_unpack_kernel(Codes c, Global<const std::uint8_t> units, Global<std::uint8_t> codes, Global<std::uint8_t> mask,
                            Global<std::uint16_t> scales, Global<std::uint16_t> minimums) {
  const std::int64_t first = static_cast<std::int64_t>(block_x()) * kThreads + thread_x();
  const std::int64_t step = static_cast<std::int64_t>(grid_x()) * kThreads, count = c.rows * c.stored;
  constexpr int kEach = 8 / BITS;
  for (std::int64_t i = first; i * kEach < count; i += step) {
    std::uint32_t byte = 0;
    SP_UNROLL
    for (int nth = 0; nth < kEach; ++nth) {
      const std::int64_t at = i * kEach + nth;
      if (at < count) byte |= packed_code<BITS>(c, units, at / c.stored, at % c.stored) << (nth * BITS);
    }
    store(codes + i, static_cast<std::uint8_t>(BITS == 8 ? byte ^ 128u : byte));
  }
  for (std::int64_t i = first; c.unit.two_four && i < c.rows * c.stride; i += step) {
    const std::int64_t row = i / c.stride, col = i % c.stride * 8;
    std::uint32_t byte = 0;
    SP_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (col + 4 * half >= c.cols) continue;
      const int in_row = static_cast<int>(row % kRows), chunk = static_cast<int>(col % kCols) / 4 + half;
      const std::int64_t at = unit_byte(c, row, col / kCols) + place_byte(c, sparse24::word_index(in_row, chunk));
      const std::uint32_t nibble = load<std::uint32_t>(units + at) >> sparse24::word_shift(in_row, chunk) & 15u;
      byte |= (1u << (nibble & 3u) | 1u << (nibble >> 2)) << (4 * half);
    }
    store(mask + i, static_cast<std::uint8_t>(byte));
  }
  for (std::int64_t i = first; i < c.rows * c.groups; i += step) {
    const std::int64_t row = i / c.groups, col = i % c.groups * c.group;
    const int set = c.unit.sets == 2 ? static_cast<int>(col % kCols) / (kCols / 2) : 0;
    const std::int64_t at = unit_byte(c, row, col / kCols) + set_byte(c, set, static_cast<int>(row % kRows));
    store(scales + i, load<std::uint16_t>(units + at));
    if (c.unit.minimums) store(minimums + i, load<std::uint16_t>(units + (at + fragments::kSetBytes)));
  }
}

SP_DEVICE float scale_at(const Codes& c, Global<const std::uint8_t> p) {
  const auto bits = load<std::uint16_t>(p);
  return c.f16_scales ? to_float(f16{bits}) : to_float(bf16{bits});
}

constexpr float kNotANumber = std::numeric_limits<float>::quiet_NaN();

template <typename T, int BITS>
SP_KERNEL SP_THREADS(kThreads, 1)
    fragments_lookup_kernel(Codes c, Global<const std::uint8_t> units, Global<const std::int64_t> indices,
                            std::int64_t count, Global<T> out) {
  for (std::int64_t task = first_task(); task < count * c.blocks; task += task_step()) {
    const std::int64_t i = task / c.blocks, block = task % c.blocks, row = load<std::int64_t>(indices + i);
    const bool inside = row >= 0 && row < c.rows;
    SP_UNROLL
    for (int nth = 0; nth < 2; ++nth) {
      const std::int64_t col = block * kCols + 2 * lane_id() + nth;
      if (col >= c.cols) continue;
      T value = from_float<T>(kNotANumber);
      if (inside) {
        const int set = c.unit.sets == 2 ? lane_id() / 16 : 0;
        const auto scales = units + (unit_byte(c, row, block) + set_byte(c, set, static_cast<int>(row % kRows)));
        const auto code = static_cast<float>(packed_code<BITS>(c, units, row, col));
        // The product is exact, so that one multiply-add is what a product and a sum are.
        value = from_float<T>(c.unit.minimums ? code * scale_at(c, scales) + scale_at(c, scales + fragments::kSetBytes)
                                              : (code - fragments::zero_code(BITS)) * scale_at(c, scales));
      }
      store(out + (i * c.cols + col), value);
    }
  }
}

template <typename T, int BITS>
int lookup(const Codes& c, const std::uint8_t* units, const std::int64_t* indices, std::int64_t count, void* out,
           void* stream) {
  const Grid grid{"fragments_lookup", blocks_for(count * c.blocks, kWarps), 1, 1, kThreads, 0, stream};
  return launch(grid, fragments_lookup_kernel<T, BITS>, c, units, indices, count, static_cast<T*>(out));
}

}  // namespace

int fragments_pack(const Packing& packing, std::int64_t rows, std::int64_t cols, const std::uint8_t* codes,
                   const std::uint8_t* mask, const std::uint16_t* scales, const std::uint16_t* minimums, std::uint8_t* units,
                   void* stream) {
  if (rows == 0) return 0;
  const Codes c = codes_of(packing, rows, cols);
  const Grid grid{"fragments_pack", blocks_for(c.all, kWarps), 1, 1, kThreads, 0, stream};
  return launch(grid, c.unit.bits == 4 ? fragments_pack_kernel<4> : fragments_pack_kernel<8>, c, codes, mask, scales,
                minimums, units);
}

int fragments_unpack(const Packing& packing, std::int64_t rows, std::int64_t cols, const std::uint8_t* units,
                     std::uint8_t* codes, std::uint8_t* mask, std::uint16_t* scales, std::uint16_t* minimums, void* stream) {
  if (rows * cols == 0) return 0;
  const Codes c = codes_of(packing, rows, cols);
  const Grid grid{
      "fragments_unpack", blocks_for(ceil_div(rows * c.stored * c.unit.bits, 8), kThreads), 1, 1, kThreads, 0, stream};
  return launch(grid, c.unit.bits == 4 ? fragments_unpack_kernel<4> : fragments_unpack_kernel<8>, c, units, codes, mask,
                scales, minimums);
}

int fragments_lookup(const Packing& packing, std::int64_t rows, std::int64_t cols, const std::uint8_t* units,
                     const std::int64_t* indices, std::int64_t count, void* out, void* stream) {
  if (packing.layout != Layout::fragments) {
    throw std::invalid_argument("packed: must hold a dense weight in int8 or int4 (layout fragments) to be looked up, got " +
                                describe(packing));
  }
  if (count * cols == 0) return 0;
  const Codes c = codes_of(packing, rows, cols);
  const bool bf = packing.dtype == DType::bf16, four = c.unit.bits == 4;
  const auto run = bf ? (four ? lookup<bf16, 4> : lookup<bf16, 8>) : (four ? lookup<f16, 4> : lookup<f16, 8>);
  return run(c, units, indices, count, out, stream);
}

}  // namespace sparseprune::cuda
