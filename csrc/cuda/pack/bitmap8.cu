// Dense words and bitmasks to bitmaps of 8 x 8 with their values, and back.
//
//   index[unit][tile] bit 8 r + c = element (r, c) of the tile is kept; values: in the order of the bits, tile after tile
//
// Layouts   dense [rows, cols] row-major; bits [rows, ceil(cols / 8)], padding zero; index, offsets [units + 1] and
//           values of units of 16 rows x 64 columns, as core/layouts/bitmap8.h lays them out.
// Needs     index and values at 16 bytes, as a blob's sections are. dense, bits: any alignment.
// Partition a warp a unit. A lane has 8 columns of a row at a time, one byte of one bitmap, as 8 lanes read a row's 64:
//
//                 columns 0-7   8-15  ..  56-63         a byte of bitmap 2 b + row / 8, b = lane % 8: the rank of its first
//     rows 0-3    lane 0        1         7             value is that of the bitmap + the popcount of the rows above it
//                 lane 8        9         15
//                 ..                      lane 31       4 such items a lane: rows 0-3, 4-7, 8-11, 12-15
//
//           Values pass through shared memory, so that a unit's, which begin at 16 bytes, are 16-byte accesses too.
// Constants One unit in shared memory per warp, 2 or 4 KB: 16 or 32 KB per block, of which 3 fit every chip.
#include "core/layouts/bitmap8.h"
#include "cuda/words.cuh"

namespace sparseprune::cuda {
namespace {

using namespace bitmap8;

constexpr int kElements = kRows * kCols;
constexpr int kItems = 4;  // bytes of bitmaps a lane has of a unit: 16 rows x 8 over 32 lanes

struct Units {
  std::int64_t rows, cols, stride;
  std::int64_t blocks, all;  // units side by side, and in all
  bool dense_aligned;        // every item to 16 bytes
};

template <typename W>
Units units_of(std::int64_t rows, std::int64_t cols, const W* dense) {
  const std::int64_t blocks = cols > 0 ? ceil_div(cols, kCols) : 1;
  return {
      rows, cols, ceil_div(cols, 8), blocks, ceil_div(rows, kRows) * blocks, shift_of(dense) == 0 && cols % kLane<W> == 0};
}

// 8 columns of a row.
template <typename W>
struct Eight {
  static constexpr int kVectors = sizeof(W) / 2;
  u32x4 v[kVectors];

  SP_DEVICE W get(int e) const {
    return element<W>(v[e / kLane<W>], e % kLane<W>);
  }
};

template <typename W>
SP_DEVICE u32x4 pack_words(const W (&w)[kLane<W>]) {
  if constexpr (sizeof(W) == 4) {
    return {w[0], w[1], w[2], w[3]};
  } else {
    return {w[0] | std::uint32_t{w[1]} << 16, w[2] | std::uint32_t{w[3]} << 16, w[4] | std::uint32_t{w[5]} << 16,
            w[6] | std::uint32_t{w[7]} << 16};
  }
}

template <typename W>
SP_DEVICE Eight<W> load_eight(Global<const W> p, std::int64_t left, bool aligned) {
  Eight<W> x;
  SP_UNROLL
  for (int j = 0; j < Eight<W>::kVectors; ++j) {
    if (aligned && left >= 8) {
      x.v[j] = load<u32x4>(p + j * kLane<W>);
    } else {
      W w[kLane<W>] = {};
      SP_UNROLL
      for (int e = 0; e < kLane<W>; ++e) {
        if (j * kLane<W> + e < left) w[e] = load<W>(p + (j * kLane<W> + e));
      }
      x.v[j] = pack_words<W>(w);
    }
  }
  return x;
}
template <typename W>
SP_DEVICE void store_eight(Global<W> p, const Eight<W>& x, std::int64_t left, bool aligned) {
  SP_UNROLL
  for (int j = 0; j < Eight<W>::kVectors; ++j) {
    if (aligned && left >= 8) {
      store(p + j * kLane<W>, x.v[j]);
    } else {
      SP_UNROLL
      for (int e = 0; e < kLane<W>; ++e) {
        if (j * kLane<W> + e < left) store(p + (j * kLane<W> + e), x.get(j * kLane<W> + e));
      }
    }
  }
}

// The lane's items of a unit's bitmaps: item i is row 4 i + lane / 8, columns from 8 (lane % 8) on.
struct Items {
  unsigned kept[kItems];  // one bit per column
  int rank[kItems];       // the first value's, within the unit
  int all;                // values of the unit
};
SP_DEVICE Items items_of(Global<const std::uint64_t> index) {
  const std::uint64_t own = lane_id() < kTiles ? load<std::uint64_t>(index + lane_id()) : std::uint64_t{0};
  const int count = popc(own), upto = inclusive_sum(count);
  Items items;
  SP_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int tile = lane_id() % 8 * 2 + half;
    const std::uint32_t low = shuffle(static_cast<std::uint32_t>(own), tile);
    const std::uint32_t high = shuffle(static_cast<std::uint32_t>(own >> 32), tile);
    const int before = shuffle(upto - count, tile);
    const std::uint64_t bitmap = std::uint64_t{high} << 32 | low;
    SP_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int shift = 8 * (4 * i + lane_id() / 8);
      items.kept[2 * half + i] = static_cast<unsigned>(bitmap >> shift) & 255u;
      items.rank[2 * half + i] = before + popc(bitmap & ((std::uint64_t{1} << shift) - 1));
    }
  }
  items.all = shuffle(upto, 31);
  return items;
}
static_assert(tile_row(1) == 8 && tile_col(2) == 8 && tile_col(14) == 56, "bitmap 2 b + half has columns 8 b, rows 8 half");

// Half a warp per unit, one lane per bitmap.
SP_KERNEL SP_THREADS(kThreads, 4) bitmap8_index_kernel(Global<const std::uint8_t> bits, Units units,
                                                       Global<std::uint64_t> index, Global<std::int64_t> counts) {
  const int tile = lane_id() % kTiles;
  for (std::int64_t pair = first_task(); 2 * pair < units.all; pair += task_step()) {
    const std::int64_t unit = 2 * pair + lane_id() / kTiles;
    const std::int64_t row0 = unit / units.blocks * kRows + tile_row(tile);
    const std::int64_t byte = (unit % units.blocks * kCols + tile_col(tile)) / 8;
    std::uint64_t bitmap = 0;
    SP_UNROLL
    for (int r = 0; r < 8; ++r) {
      if (row0 + r < units.rows && byte < units.stride) {
        bitmap |= std::uint64_t{load<std::uint8_t>(bits + ((row0 + r) * units.stride + byte))} << (8 * r);
      }
    }
    int count = popc(bitmap);
    SP_UNROLL
    for (int mask = kTiles / 2; mask > 0; mask /= 2) count += shuffle_xor(count, mask);
    if (unit >= units.all) continue;
    store(index + (unit * kTiles + tile), bitmap);
    if (tile == 0) store(counts + unit, static_cast<std::int64_t>((count + kRound - 1) / kRound * kRound));
  }
}

template <typename W>
SP_KERNEL SP_THREADS(kThreads, 3) bitmap8_pack_kernel(Global<const W> dense, Units units, Global<const std::uint64_t> index,
                                                      Global<const std::int64_t> offsets, Global<W> values) {
  const Shared<W> stage = shared_memory<W>(warp() * kElements * static_cast<unsigned>(sizeof(W)));
  for (std::int64_t unit = first_task(); unit < units.all; unit += task_step()) {
    const std::int64_t row0 = unit / units.blocks * kRows + lane_id() / 8;
    const std::int64_t col = unit % units.blocks * kCols + lane_id() % 8 * 8;
    Eight<W> x[kItems];
    SP_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const std::int64_t row = row0 + 4 * i, left = row < units.rows ? units.cols - col : 0;
      x[i] = load_eight<W>(dense + (row * units.cols + col), left, units.dense_aligned);
    }
    const Items items = items_of(index + unit * kTiles);
    SP_UNROLL
    for (int i = 0; i < kItems; ++i) {
      int rank = items.rank[i];
      SP_UNROLL
      for (int e = 0; e < 8; ++e) {
        if (items.kept[i] >> e & 1u) store(stage + rank++, x[i].get(e));
      }
    }
    const int stored = (items.all + kRound - 1) / kRound * kRound;
    if (lane_id() < stored - items.all) store(stage + (items.all + lane_id()), W{0});
    sync_warp();
    const Global<W> out = values + load<std::int64_t>(offsets + unit);
    for (int i = lane_id() * kLane<W>; i < stored; i += kPiece<W>) store(out + i, load<u32x4>(stage + i));
    sync_warp();  // the stage is written again
  }
}

// A unit whose offset cannot be is given zeros: nothing is read by it.
template <typename W>
SP_KERNEL SP_THREADS(kThreads, 3)
    bitmap8_unpack_kernel(Global<const std::uint64_t> index, Global<const std::int64_t> offsets, Global<const W> values,
                          std::int64_t stored, Units units, Global<W> dense, Global<std::uint8_t> bits) {
  const Shared<W> stage = shared_memory<W>(warp() * kElements * static_cast<unsigned>(sizeof(W)));
  for (std::int64_t unit = first_task(); unit < units.all; unit += task_step()) {
    const std::int64_t row0 = unit / units.blocks * kRows + lane_id() / 8;
    const std::int64_t col = unit % units.blocks * kCols + lane_id() % 8 * 8;
    const Items items = items_of(index + unit * kTiles);
    if (dense) {
      const std::int64_t from = load<std::int64_t>(offsets + unit);
      const int own = (items.all + kRound - 1) / kRound * kRound;
      const bool sound = from >= 0 && from % kRound == 0 && from <= stored - own;
      for (int i = lane_id() * kLane<W>; i < own; i += kPiece<W>) {
        store(stage + i, sound ? load_stream<u32x4>(values + (from + i)) : u32x4{0, 0, 0, 0});
      }
      sync_warp();
      SP_UNROLL
      for (int i = 0; i < kItems; ++i) {
        Eight<W> x;
        int rank = items.rank[i];
        SP_UNROLL
        for (int j = 0; j < Eight<W>::kVectors; ++j) {
          W w[kLane<W>] = {};
          SP_UNROLL
          for (int e = 0; e < kLane<W>; ++e) {
            if (items.kept[i] >> (j * kLane<W> + e) & 1u) w[e] = load<W>(stage + rank++);
          }
          x.v[j] = pack_words<W>(w);
        }
        const std::int64_t row = row0 + 4 * i;
        if (row < units.rows) store_eight<W>(dense + (row * units.cols + col), x, units.cols - col, units.dense_aligned);
      }
      sync_warp();  // the stage is written again
    }
    if (bits) {
      SP_UNROLL
      for (int i = 0; i < kItems; ++i) {
        const std::int64_t row = row0 + 4 * i;
        if (row < units.rows && col < units.cols) {
          store(bits + (row * units.stride + col / 8), static_cast<std::uint8_t>(items.kept[i]));
        }
      }
    }
  }
}

template <typename W>
Grid grid_of(const char* name, const Units& units, void* stream) {
  return {name,  blocks_for(units.all, kWarps), 1, 1, kThreads, kWarps * kElements * static_cast<unsigned>(sizeof(W)),
          stream};
}

template <typename W>
int run_pack(const Matrix& m, const void* dense, const std::uint64_t* index, const std::int64_t* offsets, void* values,
             void* stream) {
  const auto* x = static_cast<const W*>(dense);
  const Units units = units_of(m.rows, m.cols, x);
  return launch(grid_of<W>(by_width<W>("bitmap8_pack_16", "bitmap8_pack_32"), units, stream), bitmap8_pack_kernel<W>, x,
                units, index, offsets, static_cast<W*>(values));
}

template <typename W>
int run_unpack(const Matrix& m, const std::uint64_t* index, const std::int64_t* offsets, const void* values,
               std::int64_t stored, void* dense, std::uint8_t* bits, void* stream) {
  auto* y = static_cast<W*>(dense);
  const Units units = units_of(m.rows, m.cols, y);
  return launch(grid_of<W>(by_width<W>("bitmap8_unpack_16", "bitmap8_unpack_32"), units, stream), bitmap8_unpack_kernel<W>,
                index, offsets, static_cast<const W*>(values), stored, units, y, bits);
}

}  // namespace

int bitmap8_index(std::int64_t rows, std::int64_t cols, const std::uint8_t* bits, std::uint64_t* index, std::int64_t* counts,
                  void* stream) {
  if (rows == 0) return 0;
  const Units units = units_of(rows, cols, static_cast<const std::uint16_t*>(nullptr));
  const Grid grid{"bitmap8_index", blocks_for(units.all, 2 * kWarps), 1, 1, kThreads, 0, stream};
  return launch(grid, bitmap8_index_kernel, bits, units, index, counts);
}

int bitmap8_pack(const Matrix& m, const void* dense, const std::uint64_t* index, const std::int64_t* offsets, void* values,
                 void* stream) {
  if (m.rows * m.cols == 0) return 0;
  return size_of(m.dtype) == 2 ? run_pack<std::uint16_t>(m, dense, index, offsets, values, stream)
                               : run_pack<std::uint32_t>(m, dense, index, offsets, values, stream);
}

int bitmap8_unpack(const Matrix& m, const std::uint64_t* index, const std::int64_t* offsets, const void* values,
                   std::int64_t stored, void* dense, std::uint8_t* bits, void* stream) {
  if (m.rows * m.cols == 0) return 0;
  return size_of(m.dtype) == 2 ? run_unpack<std::uint16_t>(m, index, offsets, values, stored, dense, bits, stream)
                               : run_unpack<std::uint32_t>(m, index, offsets, values, stored, dense, bits, stream);
}

}  // namespace sparseprune::cuda
