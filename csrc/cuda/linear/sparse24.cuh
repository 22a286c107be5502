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
//                 row n of x keeps its eight 16-byte parts at place part ^ (n % 8), so that the 8 rows of an ldmatrix matrix
//                 meet 8 different groups of banks (this is also wgmma's 128-byte swizzle). linear_sparse24.h has the tiles.
//
// Where more will go. wgmma.sp (sm_90a; mma.sync reaches 60 % of its chips): linear_sparse24_sm90.cu, for tiles from 128 x
// 128 on, from the same blobs: x lies in shared memory as the instruction wants it, and warp w of a warpgroup takes its A
// registers of m64nNk32 from tile w % 2 of unit w / 2, and its metadata, by odd warps two lanes further on: one selector
// serves all four. int8: another T here and mma.sp.m16n8k64 in simt.h, units of 32 x 128 in core/layouts/sparse24.h, the
// scales of groups in a section of their own.
#pragma once

#include <initializer_list>
#include <type_traits>
#include <utility>

#include "cuda/linear/sparse24_drain.cuh"
#include "cuda/linear/sparse24_tile.cuh"

namespace sparseprune::cuda {

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
  c.x = a.copied_x + ((p.n + p.thread / 8) * a.copied_stride + std::int64_t{block} * sparse24::kCols + part * 8);
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
    const int rows = (i - C::kValueCopies - 1) * C::kXRows;
    const bool there = more && c.columns > 0 && p.thread / 8 + rows < p.copied_rows;
    const auto from = c.x + rows * a.copied_stride;
    simt::cp_async16(stage + sparse24_x_copy_byte<C>(p, rows), from, there ? 16 : 0);
  }
}

// In place of the zeros that were copied, x, where its rows do not consist of whole, aligned 16 bytes. After the wait: each
// thread overwrites its own copies. Slow, and here so that the loop of all other calls has no branch.
template <typename C>
SP_DEVICE void sparse24_gather_x(const Sparse24Args& a, const Sparse24Place& p, simt::Shared<std::uint8_t> stage,
                                 int block) {
  const std::int64_t col = std::int64_t{block} * sparse24::kCols + p.thread % 8 * 8;
  SP_ROLL
  for (int rows = 0; rows < C::kTileN; rows += C::kXRows) {
    const int n = p.thread / 8 + rows;
    const auto from = a.x + ((p.n + n) * a.stride + col);
    std::uint32_t v[8];
    SP_UNROLL
    for (int e = 0; e < 8; ++e) v[e] = n < p.x_rows && col + e < a.cols ? simt::load<std::uint16_t>(from + e) : 0;
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
  const auto arrive = [&] {
    simt::cp_async_wait<C::kStages - 2>();
    if (!a.x_vectors && block < end) sparse24_gather_x<C>(a, p, stages + read_at, block);
    if constexpr (C::kGroup == 32) {
      simt::sync_warp();
    } else {
      simt::sync_block();
    }
  };

  for (int s = 0; s < C::kStages - 1; ++s) {
    if (next.block < end) {
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
      sparse24_slots<T, C>(std::make_integer_sequence<int, C::kSlots - 1>{}, a, p, stages + read_at, stages + write_at, next,
                           next.block < end, f, acc);
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
    for (const char* part :
         {"linear_sparse24_", std::is_same_v<T, bf16> ? "bf16_" : "f16_", kSparse24Configs[CONFIG].name}) {
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
  // Where nothing of x is copied, copies of no bytes still name an aligned address.
  a.copied_x = a.x_vectors ? a.x : reinterpret_cast<const std::uint16_t*>(call.packed + g.values);
  a.copied_stride = a.x_vectors ? a.stride : 0;
  a.out_vectors = call.rows % 8 == 0 && (one ? aligned(call.out) && aligned(call.bias) : aligned(call.workspace));
  static constexpr Sparse24Name<T, CONFIG> name;
  // A tile is 256 outputs at least, so that 2^31 of them would be a terabyte.
  return simt::launch({name.text, a.tiles_m * a.tiles_n, static_cast<unsigned>(call.plan.splits), 1,
                       static_cast<unsigned>(C::kThreads), static_cast<unsigned>(C::kShared), call.stream},
                      linear_sparse24_kernel<T, CONFIG>, a);
}

}  // namespace sparseprune::cuda
