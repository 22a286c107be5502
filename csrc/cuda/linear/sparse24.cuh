// Linear, 2:4 weights of 16 bits, on the sparse tensor cores.
//
// Equation        out[n][m] = bias[m] + sum over k of weight[m][k] x[n][k], sums in float32.
//
// Operands        weight: units of 32 rows x 64 columns (core/layouts/sparse24.h), [strip of rows][block of columns], so a strip
//                 is one stream of memory. It is operand A of mma.sp.m16n8k32, which makes the batch n: 8 batch rows are
//                 the least that is multiplied, not 16, and a batch of 1 to 8 is bound by memory alone.
//                 x: [batch][cols], rows `stride` apart, any alignment. It is operand B.
//                 out: [batch][rows]; with splits > 1 float32 [splits][batch][rows] instead, without bias.
//
// Preconditions   values and metadata at 16 bytes; 1 <= rows, batch; 0 <= cols <= 2^30.
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
//                 x has the swizzle that product.cuh draws. sparse24.h has the tiles.
//
// Where more will go. wgmma.sp (sm_90a; mma.sync reaches 60 % of its chips): sparse24_sm90.cu, for tiles from 128 x
// 128 on, from the same blobs: x lies in shared memory as the instruction wants it, and warp w of a warpgroup takes its A
// registers of m64nNk32 from tile w % 2 of unit w / 2, and its metadata, by odd warps two lanes further on: one selector
// serves all four.
#pragma once

#include <type_traits>
#include <utility>

#include "cuda/linear/product.cuh"
#include "cuda/linear/product_drain.cuh"
#include "cuda/linear/sparse24.h"

namespace sparseprune::cuda {

struct Sparse24Args : ProductArgs {
  simt::Global<const std::uint8_t> values, metadata;
  std::int64_t strip_bytes;  // values of a strip
};

struct Sparse24Weight {
  static constexpr int kUnitBytes = kSparse24UnitBytes;
  static constexpr const auto& kConfigs = kSparse24Configs;
};

template <int CONFIG>
struct Sparse24Tile : ProductTile<Sparse24Weight, CONFIG> {
  using Tile = ProductTile<Sparse24Weight, CONFIG>;
  static constexpr int kValueBytes = sparse24::kValues * 2, kMetadataBytes = sparse24::kWords * 4;  // in a unit
  static constexpr int kMetadata = Tile::kBlockUnits * kValueBytes;  // in a stage: behind the values

  // Copies of 16 bytes by each thread of a group: values, metadata (one, by the first threads), x.
  static constexpr int kValueCopies = Tile::kBlockUnits * kValueBytes / 16 / Tile::kGroup;
  static constexpr int kMetadataThreadsOfUnit = kMetadataBytes / 16,
                       kMetadataThreads = Tile::kBlockUnits * kMetadataThreadsOfUnit;
  static constexpr int kCopies = kValueCopies + 1 + Tile::kXCopies;

  // A round is 2 x kTilesN slots: a step of 32 columns and a tile of 8 batch rows each. Copies are spread over the first
  // ones, so that tensor cores need not wait for their issue; with two stages over fewer, for they must land by the round's
  // end.
  static constexpr int kSlots = 2 * Tile::kTilesN;
  static constexpr int kCopySlots = Tile::kStages > 2 || Tile::kTilesN == 1 ? Tile::kTilesN : Tile::kTilesN / 2;

  static_assert(kUnitRows == sparse24::kRows && kUnitCols == sparse24::kCols);
  static_assert(kValueCopies * Tile::kGroup * 16 == kMetadata, "all threads of a group copy as many values");
  static_assert(kMetadataThreads <= Tile::kGroup, "the metadata is one copy or none for each thread");
  // A round of copies of values is a part of a unit, or some units; then offsets do not carry.
  static_assert(kValueBytes % (Tile::kGroup * 16) == 0 || Tile::kGroup * 16 % kValueBytes == 0, "groups are powers of two");
};

struct Sparse24Place : ProductPlace {
  int a_byte, e_byte;  // within a stage: the first of this lane's values and metadata
};

template <typename C>
SP_DEVICE Sparse24Place sparse24_place(const Sparse24Args& a) {
  const int lane = static_cast<int>(simt::lane());
  Sparse24Place p{product_place<C>(a), 0, 0};
  p.a_byte = p.warp_m * C::kUnits * C::kValueBytes + lane * 16;
  p.e_byte = C::kMetadata + p.warp_m * C::kUnits * C::kMetadataBytes + lane * 8;
  return p;
}

// What a thread copies next; each copy's place in memory is a constant away, or a multiple of a stride.
struct Sparse24Cursor {
  simt::Global<const std::uint8_t> values, metadata;
  simt::Global<const std::uint16_t> x;
  int block;    // counts blocks of columns
  int columns;  // left of x from the thread's part on
};

template <typename C>
SP_DEVICE Sparse24Cursor sparse24_cursor(const Sparse24Args& a, const Sparse24Place& p, int block) {
  const int unit = p.thread / C::kMetadataThreadsOfUnit, part = p.thread % 8;
  // Units past the last have zeros for values, but must have legal metadata.
  const std::int64_t metadata = (p.strip + (unit < p.units ? unit : p.units - 1)) * a.blocks + block;
  Sparse24Cursor c;
  c.values = a.values + ((p.strip * a.blocks + block) * C::kValueBytes + p.thread * 16 / C::kValueBytes * a.strip_bytes +
                         p.thread * 16 % C::kValueBytes);
  c.metadata = a.metadata + (metadata * C::kMetadataBytes + p.thread % C::kMetadataThreadsOfUnit * 16);
  c.x = product_x(a, p, block);
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

// Copy i of kCopies of this thread's part in bringing a block of columns to a stage. What there is not becomes zeros:
// columns past the last, batch rows, units, and, without `more`, all of it, which nobody reads: a size of 0 costs less than
// a branch.
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
    product_copy_x<C>(a, p, c.x, c.columns, stage, more, i - C::kValueCopies - 1);
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

template <typename T, typename C>
SP_DEVICE void sparse24_multiply(int slot, const Sparse24Fragments<C>& f, const std::uint32_t (&e)[C::kUnits],
                                 ProductSums<C>& acc) {
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
                             Sparse24Fragments<C>& f, ProductSums<C>& acc) {
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
                              bool more, Sparse24Fragments<C>& f, ProductSums<C>& acc) {
  (sparse24_slot<T, C, SLOT>(a, p, read, write, next, more, f, acc), ...);
}

template <typename T, int CONFIG>
SP_KERNEL SP_THREADS(Sparse24Tile<CONFIG>::kThreads, 1) linear_sparse24_kernel(Sparse24Args a) {
  using C = Sparse24Tile<CONFIG>;
  const Sparse24Place p = sparse24_place<C>(a);
  const auto stages = simt::shared_memory<std::uint8_t>(static_cast<unsigned>(p.k_group * C::kStages * C::kStageBytes));
  ProductSums<C> acc = {};
  Sparse24Fragments<C> f;
  Sparse24Cursor next = sparse24_cursor<C>(a, p, p.first);
  int block = next.block, read_at = 0, write_at = 0;  // the group's that is multiplied; stages of this one and of `next`
  // The one barrier of a round: the copies of the stage to be read next have landed, the others' too; and all have read the
  // stage before it, which the next round overwrites.
  const auto arrive = [&] {
    simt::cp_async_wait<C::kStages - 2>();
    if (!a.x_vectors && block < p.end) product_gather_x<C>(a, p, stages + read_at, block);
    product_sync<C>();
  };

  for (int s = 0; s < C::kStages - 1; ++s) {
    if (next.block < p.end) {
      SP_UNROLL
      for (int i = 0; i < C::kCopies; ++i) sparse24_copy<C>(a, p, next, stages + write_at, true, i);
    }
    simt::cp_async_commit();  // also without a copy: waiting counts groups
    sparse24_advance<C>(next), write_at = product_after<C>(write_at);
  }
  arrive();
  if (block < p.end) sparse24_load_first<C>(p, stages, f);
  for (int round = 0; round < p.rounds; ++round) {
    const bool mine = C::kAlone || block < p.end;
    if (mine) {
      sparse24_slots<T, C>(std::make_integer_sequence<int, C::kSlots - 1>{}, a, p, stages + read_at, stages + write_at, next,
                           next.block < p.end, f, acc);
    }
    simt::cp_async_commit();
    sparse24_advance<C>(next), write_at = product_after<C>(write_at);
    block += C::kWarpsK, read_at = product_after<C>(read_at);
    // The last slot is multiplied after the barrier, while the next stage's first fragments are on their way.
    std::uint32_t e[C::kUnits];
    SP_UNROLL
    for (int u = 0; u < C::kUnits; ++u) e[u] = f.e[1][u];
    arrive();
    if (block < p.end) sparse24_load_first<C>(p, stages + read_at, f);
    if (mine) sparse24_multiply<T, C>(C::kSlots - 1, f, e, acc);
  }
  simt::cp_async_wait<0>();
  product_drain<T, C>(a, p, acc);
}

template <typename T, int CONFIG>
int launch_sparse24(const LinearCall& call, const Geometry& g) {
  using C = Sparse24Tile<CONFIG>;
  auto a = product_args<C, Sparse24Args>(call);
  a.values = call.packed + g.values;
  a.metadata = call.packed + g.index;
  a.strip_bytes = g.kpad / kUnitCols * C::kValueBytes;
  static constexpr ProductName name(
      {"linear_sparse24_", std::is_same_v<T, bf16> ? "bf16_" : "f16_", kSparse24Configs[CONFIG].name});
  return simt::launch(product_grid<C>(name.text, a, call), linear_sparse24_kernel<T, CONFIG>, a);
}

}  // namespace sparseprune::cuda
