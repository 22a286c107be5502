// Linear, 2:4 weights of 16 bits, on the sparse tensor cores.
//
// Equation        out[n][m] = bias[m] + sum over k of weight[m][k] x[n][k], sums in float32.
//
// Operands        weight: units of 32 rows x 64 columns (core/fragments.h), [strip of rows][block of columns], so a strip
//                 is one stream of memory. It is operand A of mma.sp.m16n8k32, which makes the batch n: 8 batch rows are
//                 the least that is multiplied, not 16, and a batch of 1 to 8 is bound by memory alone.
//                 x: [batch][cols], rows `stride` apart, any alignment. It is operand B.
//                 out: [batch][rows]; with splits > 1 float32 [splits][batch][rows] instead, without bias.
//
// Preconditions   values and metadata at 16 bytes; 1 <= rows, batch; 0 <= cols < 2^31.
//
// Partition       A block makes a tile of tile_m rows x tile_n batch rows, over one split of the columns:
//
//                       tile_m rows                 blocks of 64 columns, in turn to each K group
//                   | warp_m 0 | warp_m 1 |           | 0 | 1 | .. | K-1 | 0 | 1 | ..
//                 n | warp_n 0 |          |           within a group all warps share one stage:
//                   | warp_n 1 |          |           | values of units | metadata of units | x [tile_n][64] |
//
//                 K groups exist where a tile is so small that one group could not keep memory busy. A group of one warp
//                 has no partner: its stages need sync_warp only, and slow warps hold nobody up. At the end the groups'
//                 sums meet in shared memory, which also turns rows, the registers' order, to the order of out.
//
// Constants       Shared memory is read 16 bytes a lane and without conflicts: values lie in the order of the lanes;
//                 row n of x keeps its eight 16-byte parts at place part ^ (n % 8), so that the 8 rows of an ldmatrix matrix
//                 meet 8 different groups of banks (this is also wgmma's 128-byte swizzle). linear_sparse24.h has the tiles.
//
// Where more will go. wgmma.sp (sm_90a; mma.sync reaches 60 % of its chips): linear_sparse24_sm90.cu, for tiles from 128 x 128
// on, from the same blobs: warp w of a warpgroup takes its A registers and metadata of m64nNk32 from tile w % 2 of unit
// w / 2, and x lies in shared memory as the instruction wants it. int8: another T here and mma.sp.m16n8k64 in simt.h, units
// of 32 x 128 in fragments.h, the scales of groups behind PackedHeader::reserved.
#pragma once

#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "cuda/linear_sparse24.h"
#include "cuda/launchers.h"
#include "cuda/simt.h"

namespace sparseprune::cuda {

struct Sparse24Args {
  simt::Global<const std::uint8_t> values, metadata;
  simt::Global<const std::uint16_t> x, bias;  // bias may be null
  simt::Global<std::uint16_t> out;
  simt::Global<float> partial;  // null for one split
  std::int64_t rows, batch, stride;
  std::int64_t strips;  // of 32 rows
  int cols, blocks;     // blocks of 64 columns
  unsigned tiles_m, tiles_n;
  std::int64_t strip_bytes;  // values of a strip
  bool x_vectors;    // x consists of aligned 16 bytes
  bool out_vectors;  // out or partial, and bias, 8 elements at a time
};

// A configuration as constants.
template <int CONFIG>
struct Sparse24Tile {
  static constexpr Sparse24Config kConfig = kSparse24Configs[CONFIG];
  static constexpr int kWarpsM = kConfig.warps_m, kWarpsN = kConfig.warps_n, kWarpsK = kConfig.warps_k;
  static constexpr int kUnits = kConfig.units, kTilesN = kConfig.n_tiles, kStages = kConfig.stages;
  static constexpr int kTileM = kConfig.tile_m(), kTileN = kConfig.tile_n();
  static constexpr int kThreads = kConfig.threads(), kGroup = kThreads / kWarpsK;

  static constexpr int kBlockUnits = kWarpsM * kUnits;
  static constexpr int kValueBytes = sparse24::kValues * 2, kMetadataBytes = sparse24::kWords * 4;  // of a unit
  static constexpr int kRowBytes = sparse24::kCols * 2;                                             // of x
  static constexpr int kMetadata = kBlockUnits * kValueBytes, kX = kMetadata + kBlockUnits * kMetadataBytes;
  static constexpr int kStageBytes = kConfig.stage_bytes();
  static constexpr int kShared = kConfig.shared_bytes();

  // Copies of 16 bytes by each thread of a group: values, metadata (one, by the first threads), x.
  static constexpr int kValueCopies = kBlockUnits * kValueBytes / 16 / kGroup;
  static constexpr int kMetadataThreadsOfUnit = kMetadataBytes / 16, kMetadataThreads = kBlockUnits * kMetadataThreadsOfUnit;
  static constexpr int kXRows = kGroup / 8, kXCopies = kTileN / kXRows;
  static constexpr int kCopies = kValueCopies + 1 + kXCopies;

  // A round is 2 x kTilesN slots: a step of 32 columns and a tile of 8 batch rows each. Copies are spread over the first
  // ones, so that tensor cores need not wait for their issue; with two stages over fewer, for they must land by the round's end.
  static constexpr int kSlots = 2 * kTilesN;
  static constexpr int kCopySlots = kStages > 2 || kTilesN == 1 ? kTilesN : kTilesN / 2;

  // The sums leave through shared memory, in passes of so many tiles of each warp as fit. Rows of the tile are 4 floats
  // longer than needed: the four n of a register's lanes then begin 8 banks apart.
  static constexpr int kPitch = kTileM + 4;
  static constexpr int pass_bytes(int tiles) {
    return kWarpsK * kWarpsN * tiles * 8 * kPitch * 4;
  }
  static constexpr int tiles_of_a_pass() {
    int tiles = kTilesN;
    while (pass_bytes(tiles) > kShared) tiles /= 2;
    return tiles;
  }
  static constexpr int kPassTiles = tiles_of_a_pass(), kPasses = kTilesN / kPassTiles;
  static constexpr int kPassRows = kWarpsN * kPassTiles * 8;  // batch rows

  static_assert(kShared <= kMaxShared, "every card must be able to run every configuration");
  static_assert(kValueCopies * kGroup * 16 == kMetadata, "all threads of a group copy as many values");
  static_assert(kMetadataThreads <= kGroup, "the metadata is one copy or none for each thread");
  static_assert(kXCopies * kXRows == kTileN && kXRows % 4 == 0, "a group copies x in whole rows");
  // A round of copies of values is a part of a unit, or some units; then offsets do not carry.
  static_assert(kValueBytes % (kGroup * 16) == 0 || kGroup * 16 % kValueBytes == 0, "groups are powers of two");
  static_assert(kX % 128 == 0 && kStageBytes % 128 == 0, "the swizzle works on bits 4 to 6 of an address");
  static_assert(kPassTiles * kPasses == kTilesN && kPassTiles > 0, "passes are equal");
  static_assert(kStages >= 2, "a stage arrives while another is in use");
};

// Where a thread's work lies.
struct Sparse24Place {
  int thread;  // of its K group
  int k_group, warp_m, warp_n;
  std::int64_t strip, n;          // the first of the block's tile
  int units, x_rows;              // of the tile that there are
  int a_byte, e_byte, b_byte;     // of a stage: the first of this lane's operands
  int x_byte;                     // of a stage: the first of this thread's copies of x
};

// What a thread copies next; each copy's place in memory is a constant away, or a multiple of a stride.
struct Sparse24Cursor {
  simt::Global<const std::uint8_t> values, metadata;
  simt::Global<const std::uint16_t> x;
  int block;    // of columns
  int columns;  // of x that are left from the thread's part on
};

// Byte of part `part` (8 columns) of row n of x, in a stage.
template <typename C>
SP_DEVICE int sparse24_x_byte(int n, int part) {
  return C::kX + n * C::kRowBytes + (part ^ n % 8) * 16;
}

template <typename C>
SP_DEVICE Sparse24Place sparse24_place(const Sparse24Args& a) {
  const int thread = static_cast<int>(simt::thread_x()), lane = thread % 32;
  Sparse24Place p;
  p.thread = C::kWarpsK == 1 ? thread : thread % C::kGroup;
  p.k_group = C::kWarpsK == 1 ? 0 : thread / C::kGroup;
  p.warp_m = p.thread / 32 % C::kWarpsM;
  p.warp_n = p.thread / 32 / C::kWarpsM;
  p.a_byte = p.warp_m * C::kUnits * C::kValueBytes + lane * 16;
  p.e_byte = C::kMetadata + p.warp_m * C::kUnits * C::kMetadataBytes + lane * 8;
  p.b_byte = sparse24_x_byte<C>(p.warp_n * C::kTilesN * 8 + lane % 8, lane / 8);  // matrix lane / 8 of an ldmatrix: 8 columns
  p.x_byte = sparse24_x_byte<C>(p.thread / 8, p.thread % 8);
  // Blocks that run at the same time lie in a near square of about 2048 rows, so that L2 serves most reads of both
  // operands: down the rows of a band first, then along the batch.
  constexpr unsigned kBand = 2048 / C::kTileM;
  const unsigned id = simt::block_x(), band = id / (kBand * a.tiles_n), within = id % (kBand * a.tiles_n);
  const unsigned left = a.tiles_m - band * kBand, height = left < kBand ? left : kBand;
  p.strip = static_cast<std::int64_t>(band * kBand + within % height) * C::kBlockUnits;
  p.n = static_cast<std::int64_t>(within / height) * C::kTileN;
  p.units = static_cast<int>(a.strips - p.strip < C::kBlockUnits ? a.strips - p.strip : C::kBlockUnits);
  p.x_rows = static_cast<int>(a.batch - p.n < C::kTileN ? a.batch - p.n : C::kTileN);
  return p;
}

template <typename C>
SP_DEVICE Sparse24Cursor sparse24_cursor(const Sparse24Args& a, const Sparse24Place& p, int block) {
  const int unit = p.thread / C::kMetadataThreadsOfUnit, part = p.thread % 8;
  // Units past the last have zeros for values, but must have legal metadata.
  const std::int64_t metadata = (p.strip + (unit < p.units ? unit : p.units - 1)) * a.blocks + block;
  Sparse24Cursor c;
  c.values = a.values + ((p.strip * a.blocks + block) * C::kValueBytes + p.thread * 16 / C::kValueBytes * a.strip_bytes +
                         p.thread * 16 % C::kValueBytes);
  c.metadata = a.metadata + (metadata * C::kMetadataBytes + p.thread % C::kMetadataThreadsOfUnit * 16);
  c.x = a.x + ((p.n + p.thread / 8) * a.stride + std::int64_t{block} * sparse24::kCols + part * 8);
  c.block = block;
  c.columns = a.cols - block * sparse24::kCols - part * 8;
  return c;
}

template <typename C>
SP_DEVICE void sparse24_advance(Sparse24Cursor& c) {
  c.values += C::kWarpsK * C::kValueBytes;
  c.metadata += C::kWarpsK * C::kMetadataBytes;
  c.x += C::kWarpsK * sparse24::kCols;
  c.block += C::kWarpsK;
  c.columns -= C::kWarpsK * sparse24::kCols;
}

// Place in a stage of a thread's part of row thread / 8 + `rows` of x. The swizzle of rows 4 further on is one bit away.
template <typename C>
SP_DEVICE int sparse24_x_copy_byte(const Sparse24Place& p, int rows) {
  return (p.x_byte ^ rows % 8 * 16) + rows * C::kRowBytes;
}

// Copy i of kCopies of this thread's part in bringing a block of columns to a stage. What there is not becomes zeros: columns
// past the last, batch rows, units, and, without `more`, all of it, which nobody reads: a size of 0 costs less than a branch.
template <typename C>
SP_DEVICE void sparse24_copy(const Sparse24Args& a, const Sparse24Place& p, const Sparse24Cursor& c,
                             simt::Shared<std::uint8_t> stage, bool more, int i) {
  if (i < C::kValueCopies) {
    constexpr int kRound = C::kGroup * 16;
    const int units = i * kRound / C::kValueBytes;
    const bool there = more && p.thread * 16 / C::kValueBytes + units < p.units;
    const auto from = c.values + (units * a.strip_bytes + i * kRound % C::kValueBytes);
    simt::cp_async16(stage + (p.thread * 16 + i * kRound), from, there ? 16 : 0);
  } else if (i == C::kValueCopies) {
    if (p.thread < C::kMetadataThreads) simt::cp_async16(stage + (C::kMetadata + p.thread * 16), c.metadata, more ? 16 : 0);
  } else {
    const int rows = (i - C::kValueCopies - 1) * C::kXRows;
    const bool there = more && c.columns > 0 && p.thread / 8 + rows < p.x_rows;
    const auto from = c.x + rows * a.stride;
    if (a.x_vectors) simt::cp_async16(stage + sparse24_x_copy_byte<C>(p, rows), from, there ? 16 : 0);
  }
}

// In place of the copies of x, where its rows do not consist of whole, aligned 16 bytes.
template <typename C>
SP_DEVICE void sparse24_gather_x(const Sparse24Args& a, const Sparse24Place& p, const Sparse24Cursor& c,
                                 simt::Shared<std::uint8_t> stage) {
  SP_ROLL
  for (int i = 0; i < C::kXCopies; ++i) {
    const int rows = i * C::kXRows, columns = p.thread / 8 + rows < p.x_rows ? c.columns : 0;
    const auto from = c.x + rows * a.stride;
    std::uint32_t v[8];
    SP_UNROLL
    for (int e = 0; e < 8; ++e) v[e] = e < columns ? simt::load<std::uint16_t>(from + e) : 0;
    simt::store(stage + sparse24_x_copy_byte<C>(p, rows),
                simt::u32x4{v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16});
  }
}

// A warp's operands: of both steps A and metadata, of this slot and the next B.
template <typename C>
struct Sparse24Fragments {
  std::uint32_t a[2][C::kUnits][2][4], e[2][C::kUnits], b[2][4];
};

template <typename C>
SP_DEVICE void sparse24_load_a(const Sparse24Place& p, simt::Shared<std::uint8_t> stage, int step, Sparse24Fragments<C>& f) {
  const auto values = stage + p.a_byte;
  SP_UNROLL
  for (int u = 0; u < C::kUnits; ++u) {
    SP_UNROLL
    for (int h = 0; h < 2; ++h) {
      const auto v = simt::load<simt::u32x4>(values + (u * C::kValueBytes + (step * 2 + h) * 512));
      auto& a = f.a[step][u][h];
      a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
    }
  }
}

template <typename C>
SP_DEVICE void sparse24_load_b(const Sparse24Place& p, simt::Shared<std::uint8_t> stage, int slot, Sparse24Fragments<C>& f) {
  const int step = slot / C::kTilesN, j = slot % C::kTilesN;
  // The second step's columns are 4 parts further on, which the swizzle leaves one bit away.
  simt::ldmatrix_x4(f.b[slot % 2], stage + ((p.b_byte ^ step * 64) + j * 8 * C::kRowBytes));
}

// What slot 0 needs of a stage.
template <typename C>
SP_DEVICE void sparse24_load_first(const Sparse24Place& p, simt::Shared<std::uint8_t> stage, Sparse24Fragments<C>& f) {
  const auto metadata = stage + p.e_byte;
  SP_UNROLL
  for (int u = 0; u < C::kUnits; ++u) {
    const auto words = simt::load<simt::u32x2>(metadata + u * C::kMetadataBytes);
    f.e[0][u] = words.x, f.e[1][u] = words.y;
  }
  sparse24_load_a<C>(p, stage, 0, f);
  sparse24_load_b<C>(p, stage, 0, f);
}

// [unit][tile of 16 rows][tile of 8 batch rows][register]
template <typename C>
using Sparse24Sums = float[C::kUnits][2][C::kTilesN][4];

template <typename T, typename C>
SP_DEVICE void sparse24_multiply(int slot, const Sparse24Fragments<C>& f, const std::uint32_t (&e)[C::kUnits],
                                 Sparse24Sums<C>& acc) {
  const int step = slot / C::kTilesN, j = slot % C::kTilesN;
  SP_UNROLL
  for (int u = 0; u < C::kUnits; ++u) {
    simt::mma_sp_m16n8k32<T, 0>(acc[u][0][j], f.a[step][u][0], f.b[slot % 2], e[u]);
    simt::mma_sp_m16n8k32<T, 1>(acc[u][1][j], f.a[step][u][1], f.b[slot % 2], e[u]);
  }
}

// A slot and what is issued beside it: its share of the copies to `write`, and the fragments of the slots to come.
template <typename T, typename C, int SLOT>
SP_DEVICE void sparse24_slot(const Sparse24Args& a, const Sparse24Place& p, simt::Shared<std::uint8_t> read,
                             simt::Shared<std::uint8_t> write, const Sparse24Cursor& next, bool more,
                             Sparse24Fragments<C>& f, Sparse24Sums<C>& acc) {
  SP_UNROLL
  for (int i = 0; i < C::kCopies; ++i) {
    if (i * C::kCopySlots / C::kCopies == SLOT) sparse24_copy<C>(a, p, next, write, more, i);
  }
  sparse24_load_b<C>(p, read, SLOT + 1, f);
  if constexpr (SLOT == C::kTilesN / 2) sparse24_load_a<C>(p, read, 1, f);
  sparse24_multiply<T, C>(SLOT, f, f.e[SLOT / C::kTilesN], acc);
}

// By a parameter pack, because nvcc leaves the loop rolled and the registers in memory.
template <typename T, typename C, int... SLOT>
SP_DEVICE void sparse24_slots(std::integer_sequence<int, SLOT...>, const Sparse24Args& a, const Sparse24Place& p,
                              simt::Shared<std::uint8_t> read, simt::Shared<std::uint8_t> write, const Sparse24Cursor& next,
                              bool more, Sparse24Fragments<C>& f, Sparse24Sums<C>& acc) {
  (sparse24_slot<T, C, SLOT>(a, p, read, write, next, more, f, acc), ...);
}

SP_DEVICE std::uint32_t sparse24_bits(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
SP_DEVICE float sparse24_float(std::uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// Eight rows of one batch row, from `row` on, as far as there are.
template <typename T>
SP_DEVICE void sparse24_write(const Sparse24Args& a, std::int64_t n, std::int64_t row, float (&sum)[8]) {
  const std::int64_t at = n * a.rows + row;
  const int valid = a.rows - row < 8 ? static_cast<int>(a.rows - row) : 8;
  if (a.partial) {
    const auto to = a.partial + (static_cast<std::int64_t>(simt::block_y()) * a.batch * a.rows + at);
    if (a.out_vectors) {
      SP_UNROLL
      for (int e = 0; e < 8; e += 4) {
        simt::store(to + e, simt::u32x4{sparse24_bits(sum[e]), sparse24_bits(sum[e + 1]), sparse24_bits(sum[e + 2]),
                                        sparse24_bits(sum[e + 3])});
      }
      return;
    }
    SP_UNROLL
    for (int e = 0; e < 8; ++e) {
      if (e < valid) simt::store(to + e, sum[e]);
    }
    return;
  }
  std::uint32_t pair[4] = {};
  if (a.out_vectors) {
    if (a.bias) {
      const auto v = simt::load<simt::u32x4>(a.bias + row);
      pair[0] = v.x, pair[1] = v.y, pair[2] = v.z, pair[3] = v.w;
    }
    SP_UNROLL
    for (int e = 0; e < 4; ++e) {
      const T low{static_cast<std::uint16_t>(pair[e] & 0xffff)}, high{static_cast<std::uint16_t>(pair[e] >> 16)};
      const std::uint32_t first = simt::from_float<T>(sum[2 * e] + simt::to_float(low)).bits;
      const std::uint32_t second = simt::from_float<T>(sum[2 * e + 1] + simt::to_float(high)).bits;
      pair[e] = first | second << 16;
    }
    simt::store(a.out + at, simt::u32x4{pair[0], pair[1], pair[2], pair[3]});
    return;
  }
  SP_UNROLL
  for (int e = 0; e < 8; ++e) {
    if (e >= valid) continue;
    if (a.bias) sum[e] += simt::to_float(T{simt::load<std::uint16_t>(a.bias + (row + e))});
    simt::store(a.out + (at + e), simt::from_float<T>(sum[e]).bits);
  }
}

// The sums of the K groups, added up in their order: the result does not depend on which warp was first.
template <typename T, typename C>
SP_DEVICE void sparse24_drain(const Sparse24Args& a, const Sparse24Place& p,
                              const Sparse24Sums<C>& acc) {
  const int lane = static_cast<int>(simt::lane()), thread = static_cast<int>(simt::thread_x());
  const auto tile = simt::shared_memory<float>(0);  // [k group][batch row of the pass][row]
  constexpr int kGroupFloats = C::kPassRows * C::kPitch;
  SP_UNROLL
  for (int pass = 0; pass < C::kPasses; ++pass) {
    simt::sync_block();  // the last stage, or the pass before, is read
    SP_UNROLL
    for (int j = 0; j < C::kPassTiles; ++j) {
      const int n = (p.warp_n * C::kPassTiles + j) * 8 + lane % 4 * 2;
      SP_UNROLL
      for (int u = 0; u < C::kUnits; ++u) {
        SP_UNROLL
        for (int h = 0; h < 2; ++h) {
          const auto& c = acc[u][h][pass * C::kPassTiles + j];
          const auto to = tile + (p.k_group * kGroupFloats + n * C::kPitch +
                                  (p.warp_m * C::kUnits + u) * sparse24::kRows + h * 16 + lane / 4);
          simt::store(to, c[0]);
          simt::store(to + C::kPitch, c[1]);
          simt::store(to + 8, c[2]);
          simt::store(to + (C::kPitch + 8), c[3]);
        }
      }
    }
    simt::sync_block();  // all sums of the pass are there
    constexpr int kParts = C::kTileM / 8;
    SP_ROLL
    for (int i = thread; i < C::kPassRows * kParts; i += C::kThreads) {
      const int local = i / kParts, part = i % kParts;
      const int n = (local / (C::kPassTiles * 8) * C::kTilesN + pass * C::kPassTiles) * 8 + local % (C::kPassTiles * 8);
      const std::int64_t row = p.strip * sparse24::kRows + part * 8;
      if (n >= p.x_rows || row >= a.rows) continue;
      // Four neighbours of eight read the two halves in the other order, or lanes 0 and 4 would meet in a bank.
      const int swap = part / 4 % 2;
      float half[2][4] = {};
      SP_UNROLL
      for (int k = 0; k < C::kWarpsK; ++k) {
        SP_UNROLL
        for (int q = 0; q < 2; ++q) {
          const auto v = simt::load<simt::u32x4>(tile + (k * kGroupFloats + local * C::kPitch + part * 8 + (q ^ swap) * 4));
          half[q][0] += sparse24_float(v.x), half[q][1] += sparse24_float(v.y);
          half[q][2] += sparse24_float(v.z), half[q][3] += sparse24_float(v.w);
        }
      }
      float sum[8];
      SP_UNROLL
      for (int e = 0; e < 4; ++e) {
        sum[e] = swap ? half[1][e] : half[0][e];
        sum[e + 4] = swap ? half[0][e] : half[1][e];
      }
      sparse24_write<T>(a, p.n + n, row, sum);
    }
  }
}

template <typename T, int CONFIG>
SP_KERNEL SP_THREADS(Sparse24Tile<CONFIG>::kThreads, 1) linear_sparse24_kernel(Sparse24Args a) {
  using C = Sparse24Tile<CONFIG>;
  const Sparse24Place p = sparse24_place<C>(a);
  const auto stages = simt::shared_memory<std::uint8_t>(static_cast<unsigned>(p.k_group * C::kStages * C::kStageBytes));
  const std::int64_t split = simt::block_y(), splits = simt::grid_y();
  const int first = static_cast<int>(a.blocks * split / splits), end = static_cast<int>(a.blocks * (split + 1) / splits);
  // Groups that meet at a barrier have equally many rounds, the last one perhaps without a block of columns for some.
  constexpr bool kAlone = C::kGroup == 32 || C::kWarpsK == 1;
  const int rounds = (end - first - (kAlone ? p.k_group : 0) + C::kWarpsK - 1) / C::kWarpsK;

  Sparse24Sums<C> acc = {};
  Sparse24Fragments<C> f;
  Sparse24Cursor next = sparse24_cursor<C>(a, p, first + p.k_group);
  int block = next.block, read_at = 0, write_at = 0;  // the group's that is multiplied; stages of this one and of `next`
  const auto after = [](int at) { return at == (C::kStages - 1) * C::kStageBytes ? 0 : at + C::kStageBytes; };
  // The one barrier of a round: the copies of the stage to be read next have landed, the others' too; and all have read the
  // stage before it, which the next round overwrites.
  const auto arrive = [] {
    simt::cp_async_wait<C::kStages - 2>();
    if constexpr (C::kGroup == 32) {
      simt::sync_warp();
    } else {
      simt::sync_block();
    }
  };

  for (int s = 0; s < C::kStages - 1; ++s) {
    if (next.block < end) {
      if (!a.x_vectors) sparse24_gather_x<C>(a, p, next, stages + write_at);
      SP_UNROLL
      for (int i = 0; i < C::kCopies; ++i) sparse24_copy<C>(a, p, next, stages + write_at, true, i);
    }
    simt::cp_async_commit();  // also without a copy: waiting counts groups
    sparse24_advance<C>(next), write_at = after(write_at);
  }
  arrive();
  if (block < end) sparse24_load_first<C>(p, stages, f);
  for (int round = 0; round < rounds; ++round) {
    const bool mine = kAlone || block < end;
    if (mine) {
      const bool more = next.block < end;
      if (more && !a.x_vectors) sparse24_gather_x<C>(a, p, next, stages + write_at);
      sparse24_slots<T, C>(std::make_integer_sequence<int, C::kSlots - 1>{}, a, p, stages + read_at, stages + write_at, next,
                           more, f, acc);
    }
    simt::cp_async_commit();
    sparse24_advance<C>(next), write_at = after(write_at);
    block += C::kWarpsK, read_at = after(read_at);
    // The last slot is multiplied after the barrier, while the next stage's first fragments are on their way.
    std::uint32_t e[C::kUnits];
    SP_UNROLL
    for (int u = 0; u < C::kUnits; ++u) e[u] = f.e[1][u];
    arrive();
    if (block < end) sparse24_load_first<C>(p, stages + read_at, f);
    if (mine) sparse24_multiply<T, C>(C::kSlots - 1, f, e, acc);
  }
  simt::cp_async_wait<0>();
  sparse24_drain<T, C>(a, p, acc);
}

// For reports: linear_sparse24_bf16_n8_m32_k8, put together by the compiler.
template <typename T, int CONFIG>
struct Sparse24Name {
  char text[64] = {};
  constexpr Sparse24Name() {
    int size = 0;
    for (const char* part : {"linear_sparse24_", std::is_same_v<T, bf16> ? "bf16_" : "f16_", kSparse24Configs[CONFIG].name}) {
      for (; *part; ++part) text[size++] = *part;
    }
  }
};

template <typename T, int CONFIG>
int launch_sparse24(const LinearCall& call, const Geometry& g) {
  using C = Sparse24Tile<CONFIG>;
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  const bool one = call.plan.splits == 1;
  const std::int64_t tiles_m = ceil_div(call.rows, C::kTileM), tiles_n = ceil_div(call.batch, C::kTileN);
  Sparse24Args a{};
  a.values = call.packed + g.values;
  a.metadata = call.packed + g.index;
  a.x = static_cast<const std::uint16_t*>(call.x);
  a.bias = static_cast<const std::uint16_t*>(one ? call.bias : nullptr);
  a.out = static_cast<std::uint16_t*>(one ? call.out : nullptr);
  a.partial = static_cast<float*>(one ? nullptr : call.workspace);
  a.rows = call.rows, a.batch = call.batch, a.stride = call.stride;
  a.strips = ceil_div(call.rows, sparse24::kRows);
  a.strip_bytes = g.kpad / sparse24::kCols * C::kValueBytes;
  a.cols = static_cast<int>(call.cols);
  a.blocks = static_cast<int>(ceil_div(call.cols, sparse24::kCols));  // 0 without columns: the sums are then zero
  a.tiles_m = static_cast<unsigned>(tiles_m), a.tiles_n = static_cast<unsigned>(tiles_n);
  a.x_vectors = aligned(call.x) && call.cols % 8 == 0 && (call.stride % 8 == 0 || call.batch == 1);
  a.out_vectors = call.rows % 8 == 0 && (one ? aligned(call.out) && aligned(call.bias) : aligned(call.workspace));
  static constexpr Sparse24Name<T, CONFIG> name;
  // A tile is 256 outputs at least, so that 2^31 of them would be a terabyte.
  return simt::launch({name.text, a.tiles_m * a.tiles_n, static_cast<unsigned>(call.plan.splits), 1,
                       static_cast<unsigned>(C::kThreads), static_cast<unsigned>(C::kShared), call.stream},
                      linear_sparse24_kernel<T, CONFIG>, a);
}

}  // namespace sparseprune::cuda
