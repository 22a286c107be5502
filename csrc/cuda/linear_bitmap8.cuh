// The walk over a weight in layout bitmap8, shared by the linears that multiply by tensor cores (linear_bitmap8.cu) and by
// multiply-adds (linear_bitmap8_f32.cu): they differ in Sum, which multiplies one unit.
//
// Equation       out[b][r] = bias[r] + sum over the kept (r, c) of weight[r][c] * x[b][c], in float32.
// Operands       weight: units of 16 rows x 64 columns, [strip of rows][block of columns] (core/fragments.h): offsets int64
//                [units + 1], 128 bytes of bitmaps each, values in the order of the bits, each unit's from 16 bytes on.
//                x [batch, cols], rows `stride` elements apart; bias [rows] or null; out [batch, rows].
//                With splits > 1 instead of out: workspace float32 [splits, batch, rows], no bias.
// Preconditions  the blob and its sections aligned to 16 bytes, x to its elements. Offsets and bitmaps are not trusted:
//                whatever they hold, no access leaves the blob or the block's shared memory.
// Partition      a block has M = 16 WARPS_M rows, N batch rows, and the columns of its split. Warp (wm, wk) walks strip wm
// and,
//                in step with all others, every WARPS_K-th block of columns:
//
//                    columns   0      64     128    192    256    320  ...
//                    strip 0   (0,0)  (0,1)  (0,2)  (0,3)  (0,0)  (0,1)        WARPS_M = 2, WARPS_K = 4
//                    strip 1   (1,0)  (1,1)  (1,2)  (1,3)  (1,0)  (1,1)
//                    x tile     0      1      2      3      0      1           the warps (*, wk) share one
//
//                A stage in shared memory: for each warp a unit's values (room for all 1024) and bitmaps, for each wk an x
//                tile [N][64]. STAGES of them are a ring that cp.async fills STAGES - 1 ahead. A unit has a slot of its own
//                because its length is only known by its offsets, which lanes fetch for 32 units at a time, a window ahead.
//                At the end the sums of the WARPS_K warps are added through shared memory.
//                Blocks that differ in the batch rows alone are neighbours: they read the same weights from L2.
// Constants      Memory needs some 20 KB under way per SM (H100: 25 bytes a ns, 700 ns). At 50 % a unit is 1.1 KB, so 8
// warps
//                with 2 stages ahead are enough on any card, and 75 KB let two such blocks share an SM of 164 KB or more.
//                99 KB is what a block may have on sm_86, 89 and 120.
#pragma once

#include <cstring>

#include "core/packed.h"
#include "cuda/bitmap8.cuh"
#include "cuda/launchers.h"
#include "cuda/simt.h"

namespace sparseprune::cuda {

template <typename T_, int WARPS_M, int WARPS_K, int N_, int STAGES, int BLOCKS>
struct Bitmap8Tile {
  using T = T_;
  using Word = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t>;  // what carries a T where it is but moved
  static constexpr int kWarpsM = WARPS_M, kWarpsK = WARPS_K, kStages = STAGES, kBlocks = BLOCKS;
  static constexpr int kM = bitmap8::kRows * WARPS_M, kN = N_;
  static constexpr int kThreads = 32 * WARPS_M * WARPS_K, kGroup = 32 * WARPS_M;  // kGroup: that share an x tile
  static constexpr int kItem = sizeof(T), kPer16 = 16 / kItem;                    // values in 16 bytes

  // Bitmaps lie behind the values: a lane with nothing to take may look up to 2 past the last value of a full unit.
  static constexpr int kValueBytes = bitmap8::kRows * bitmap8::kCols * kItem, kBitmapBytes = bitmap8::kTiles * 8;
  static constexpr int kSlot = kValueBytes + kBitmapBytes;
  static constexpr int kXRow = bitmap8::kCols * kItem, kXChunks = kXRow / 16;  // of one batch row
  static constexpr int kStage = WARPS_M * WARPS_K * kSlot + WARPS_K * kN * kXRow;
  // Sums [WARPS_K][N][kPitch]: 2 kPitch is 8 modulo 32 banks, so that 4 lanes 2 batch rows apart, of 8 rows each, meet in
  // none.
  static constexpr int kPitch = kM + 4, kSumBytes = WARPS_K * kN * kPitch * 4;
  static constexpr int kShared = STAGES * kStage > kSumBytes ? STAGES * kStage : kSumBytes;

  static constexpr int kXRows = kGroup / kXChunks;  // batch rows that a group copies at once
  // Where a batch row has its chunk: linear_bitmap8.cu says why not simply in order.
  static SP_SHARED_CODE constexpr int x_chunk(int row, int chunk) {
    return kItem == 2 ? chunk ^ row % 8 : chunk;
  }
  static_assert(kN % kXRows == 0, "the threads of a group copy whole rows of x");
  static_assert(STAGES >= 2 && kShared <= 99 * 1024, "a ring, and no more shared memory than the smallest card has");
};

template <typename Tile>
struct Bitmap8Args {
  using Word = typename Tile::Word;
  simt::Global<const std::int64_t> offsets;
  simt::Global<const std::uint8_t> index;
  simt::Global<const Word> values, x;
  simt::Global<const typename Tile::T> bias;
  simt::Global<typename Tile::T> out;
  simt::Global<float> workspace;  // null without splits
  std::int64_t stored, rows, cols, batch, stride;
  std::int64_t batch_begin;  // of this launch
  int strips, blocks, n_tiles, splits;
  bool x_aligned;  // every row of x to 16 bytes
};

// What a block and a warp of it are to do.
template <typename Tile>
struct Bitmap8Task {
  std::int64_t row, batch;  // the block's first
  int strip, begin, end;    // the warp's strip, the block's columns / 64
  int warp_m, warp_k, batch_rows;

  SP_DEVICE explicit Bitmap8Task(const Bitmap8Args<Tile>& args) {
    const unsigned tiles = static_cast<unsigned>(args.n_tiles), m_tile = simt::block_x() / tiles;
    row = static_cast<std::int64_t>(m_tile) * Tile::kM;
    batch = args.batch_begin + static_cast<std::int64_t>(simt::block_x() % tiles) * Tile::kN;
    const std::int64_t left = args.batch - batch;
    batch_rows = left < Tile::kN ? static_cast<int>(left) : Tile::kN;
    warp_m = static_cast<int>(simt::warp()) % Tile::kWarpsM;
    warp_k = static_cast<int>(simt::warp()) / Tile::kWarpsM;
    strip = static_cast<int>(m_tile) * Tile::kWarpsM + warp_m;
    const std::int64_t split = simt::block_y(), blocks = args.blocks;
    begin = static_cast<int>(blocks * split / args.splits);
    end = static_cast<int>(blocks * (split + 1) / args.splits);
  }
};

// Fills the ring.
template <typename Tile>
class Bitmap8Stream {
  using Word = typename Tile::Word;
  static constexpr int kWindow = 32;

 public:
  SP_DEVICE Bitmap8Stream(const Bitmap8Args<Tile>& args, const Bitmap8Task<Tile>& task) : args_(args), task_(task) {
    thread_ = static_cast<int>(simt::thread_x()) % Tile::kGroup;
    chunk_ = thread_ % Tile::kXChunks, row_ = thread_ / Tile::kXChunks;
    x_ = args.x + ((task.batch + row_) * args.stride + chunk_ * Tile::kPer16);
    unit_ = static_cast<std::int64_t>(task.strip) * args.blocks;
    next_ = window(0);
    // Batch rows that are not there: zeros, once.
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      for (int row = row_; row < Tile::kN; row += Tile::kXRows) {
        if (row >= task.batch_rows)
          simt::store(simt::shared_memory<std::uint8_t>(x_at(stage, row)), simt::u32x4{0, 0, 0, 0});
      }
    }
  }

  // The block of columns that this warp has in iteration i; past the end where it has none.
  SP_DEVICE int block_of(int i) const {
    return task_.begin + task_.warp_k + i * Tile::kWarpsK;
  }
  // Alike for all lanes of a warp.
  SP_DEVICE bool has_unit(int i) const {
    return block_of(i) < task_.end && task_.strip < args_.strips;
  }

  SP_DEVICE unsigned values_at(int stage) const {
    return stage * Tile::kStage + simt::warp() * Tile::kSlot;
  }
  SP_DEVICE unsigned x_at(int stage) const {
    return stage * Tile::kStage + Tile::kWarpsM * Tile::kWarpsK * Tile::kSlot + task_.warp_k * Tile::kN * Tile::kXRow;
  }

  // Sets what iteration i needs under way. Every i once, in order.
  SP_DEVICE void fetch(int i, int stage) {
    if (i % kWindow == 0) {
      now_ = next_;
      next_ = window(i + kWindow);
    }
    const int block = block_of(i);
    if (block < task_.end) fetch_x(block, stage);
    if (has_unit(i)) fetch_unit(i, block, stage);
  }

 private:
  // Where the values of 32 units of this warp lie: those of iteration i + lane, in eights, counted from `first`.
  struct Window {
    std::int64_t first;
    std::uint32_t mine;  // distance << 8 | length
  };

  SP_DEVICE std::int64_t offset(int block) const {  // multiple of 8 within the blob, whatever it holds
    const std::int64_t v = args_.offsets[unit_ + block];
    return (v < 0 ? 0 : v > args_.stored ? args_.stored : v) & ~std::int64_t{7};
  }

  SP_DEVICE Window window(int i) const {
    Window w{};
    if (!has_unit(i)) return w;
    w.first = offset(block_of(i));
    const int j = i + static_cast<int>(simt::lane());
    if (!has_unit(j)) return w;
    const std::int64_t begin = offset(block_of(j)), far = begin - w.first, length = offset(block_of(j) + 1) - begin;
    static_assert(kWindow * Tile::kWarpsK * 128 < 1 << 24, "distances, in eights of values, fit their 24 bits");
    if (far < 0 || far >= std::int64_t{8} << 24 || length < 0) return w;
    w.mine = static_cast<std::uint32_t>(far / 8) << 8 | static_cast<std::uint32_t>(length < 1024 ? length / 8 : 128);
    return w;
  }

  SP_DEVICE void fetch_unit(int i, int block, int stage) const {
    const unsigned slot = values_at(stage);
    const int lane = static_cast<int>(simt::lane());
    if (lane < Tile::kBitmapBytes / 16) {
      simt::cp_async16(simt::shared_memory<std::uint8_t>(slot + Tile::kValueBytes + 16 * lane),
                       args_.index + ((unit_ + block) * Tile::kBitmapBytes + 16 * lane), 16);
    }
    const std::uint32_t mine = simt::shuffle(now_.mine, i % kWindow);
    const int chunks = static_cast<int>(mine & 255u) * (8 / Tile::kPer16);
    const auto values = args_.values + (now_.first + static_cast<std::int64_t>(mine >> 8) * 8 + lane * Tile::kPer16);
    SP_UNROLL
    for (int j = 0; j < Tile::kValueBytes / 512; ++j) {
      if (lane + 32 * j < chunks) {
        simt::cp_async16(simt::shared_memory<Word>(slot + 16 * lane + 512 * j), values + 32 * Tile::kPer16 * j, 16);
      }
    }
    // A lane with nothing to take looks up to 2 past the last value.
    if (lane == 0 && chunks < Tile::kValueBytes / 16) {
      simt::store(simt::shared_memory<Word>(slot + 16 * chunks), simt::u32x4{0, 0, 0, 0});
    }
  }

  // The place of this thread's chunk of a batch row.
  SP_DEVICE unsigned x_at(int stage, int row) const {
    return x_at(stage) + row * Tile::kXRow + 16 * Tile::x_chunk(row, chunk_);
  }

  SP_DEVICE void fetch_x(int block, int stage) const {
    const std::int64_t column = static_cast<std::int64_t>(block) * bitmap8::kCols;
    const std::int64_t past = args_.cols - column - chunk_ * Tile::kPer16;
    const int valid = past >= Tile::kPer16 ? Tile::kPer16 : past > 0 ? static_cast<int>(past) : 0;
    const bool whole = args_.x_aligned && valid == Tile::kPer16;
    SP_UNROLL
    for (int j = 0; j < Tile::kN / Tile::kXRows; ++j) {
      const int row = row_ + j * Tile::kXRows;
      if (row >= task_.batch_rows) continue;
      const auto src = x_ + (column + j * Tile::kXRows * args_.stride);
      const auto dst = simt::shared_memory<Word>(x_at(stage, row));
      if (whole) {
        simt::cp_async16(dst, src, 16);
      } else {
        simt::store(dst, gather(src, valid));
      }
    }
  }

  // 16 bytes at any alignment, zeros past the last column.
  static SP_DEVICE simt::u32x4 gather(simt::Global<const Word> src, int valid) {
    std::uint32_t w[4] = {};
    SP_UNROLL
    for (int e = 0; e < Tile::kPer16; ++e) {
      if (e < valid)
        w[e * Tile::kItem / 4] |= static_cast<std::uint32_t>(src[e]) << 8 * Tile::kItem * (e % (4 / Tile::kItem));
    }
    return {w[0], w[1], w[2], w[3]};
  }

  const Bitmap8Args<Tile>& args_;
  const Bitmap8Task<Tile>& task_;
  simt::Global<const Word> x_;
  std::int64_t unit_;
  int thread_, chunk_, row_;
  Window now_{}, next_{};
};

// The sums of all warps from shared memory, added up and written. Threads go along rows: out has them side by side.
template <typename Tile>
SP_DEVICE void write_sums(const Bitmap8Args<Tile>& args, const Bitmap8Task<Tile>& task) {
  const auto sums = simt::shared_memory<float>(0);
  for (int e = static_cast<int>(simt::thread_x()); e < Tile::kM * task.batch_rows; e += Tile::kThreads) {
    const int n = e / Tile::kM, m = e % Tile::kM;
    const std::int64_t row = task.row + m, batch = task.batch + n;
    if (row >= args.rows) continue;
    float sum = 0;
    SP_UNROLL
    for (int k = 0; k < Tile::kWarpsK; ++k) sum += simt::load<float>(sums + ((k * Tile::kN + n) * Tile::kPitch + m));
    if (args.workspace) {
      args.workspace[(simt::block_y() * args.batch + batch) * args.rows + row] = sum;
    } else {
      if (args.bias) sum += simt::to_float(simt::load<typename Tile::T>(args.bias + row));
      args.out[batch * args.rows + row] = simt::from_float<typename Tile::T>(sum);
    }
  }
}

// Sum: of one warp, [N][16 rows].
//   add(me, unit, values, x)   plus the product of a unit (values: byte offset of its slot) and an x tile (byte offset)
//   put(first)                 into shared memory as float [N][kPitch], from byte offset `first`
template <typename Tile, typename Sum>
SP_KERNEL SP_THREADS(Tile::kThreads, Tile::kBlocks) linear_bitmap8_kernel(const Bitmap8Args<Tile> args) {
  const Bitmap8Task<Tile> task(args);
  Bitmap8Stream<Tile> stream(args, task);
  const Bitmap8Lane me = bitmap8_lane();
  Sum sum{};

  const int iterations = (task.end - task.begin + Tile::kWarpsK - 1) / Tile::kWarpsK;
  int put = 0, take = 1;  // stages: the oldest of the ring is free, the next is to be worked on
  for (int i = 1 - Tile::kStages; i < iterations; ++i) {
    // Stage `take` has landed, for all who share it, and nobody reads stage `put` any more.
    simt::cp_async_wait<Tile::kStages - 2>();
    if constexpr (Tile::kWarpsM == 1) {
      simt::sync_warp();
    } else {
      simt::sync_block();
    }
    stream.fetch(i + Tile::kStages - 1, put);
    simt::cp_async_commit();
    if (i >= 0 && stream.has_unit(i)) {
      const unsigned slot = stream.values_at(take);
      sum.add(me, index_unit(me, simt::shared_memory<std::uint8_t>(slot + Tile::kValueBytes)), slot, stream.x_at(take));
    }
    put = put + 1 < Tile::kStages ? put + 1 : 0;
    take = take + 1 < Tile::kStages ? take + 1 : 0;
  }

  simt::cp_async_wait<0>();
  simt::sync_block();  // the ring becomes room for the sums
  sum.put((task.warp_k * Tile::kN * Tile::kPitch + bitmap8::kRows * task.warp_m) * 4);
  simt::sync_block();
  write_sums(args, task);
}

template <typename Tile, typename Sum>
int launch_linear_bitmap8(const char* name, const LinearCall& call, const Geometry& geometry) {
  using Word = typename Tile::Word;
  using T = typename Tile::T;
  constexpr std::int64_t kMaxGrid = 2147483647;
  const std::int64_t m_tiles = ceil_div(call.rows, Tile::kM), n_tiles = ceil_div(call.batch, Tile::kN);
  const std::int64_t stride = call.batch == 1 ? 0 : call.stride;  // of one row it says nothing

  Bitmap8Args<Tile> args{};
  args.offsets = reinterpret_cast<const std::int64_t*>(call.packed + geometry.offsets);
  args.index = call.packed + geometry.index;
  args.values = reinterpret_cast<const Word*>(call.packed + geometry.values);
  args.x = static_cast<const Word*>(call.x);
  args.bias = static_cast<const T*>(call.bias);
  args.out = static_cast<T*>(call.out);
  if (call.plan.splits > 1) args.workspace = static_cast<float*>(call.workspace);
  args.stored = (geometry.total - geometry.values) / Tile::kItem;
  args.rows = call.rows, args.cols = call.cols, args.batch = call.batch, args.stride = stride;
  args.strips = static_cast<int>(ceil_div(call.rows, bitmap8::kRows));
  args.blocks = static_cast<int>(geometry.kpad / bitmap8::kCols);
  args.splits = call.plan.splits;
  args.x_aligned = reinterpret_cast<std::uintptr_t>(call.x) % 16 == 0 && stride * Tile::kItem % 16 == 0;

  // One launch, but where blocks are more than a grid may have.
  const std::int64_t at_once = n_tiles < kMaxGrid / m_tiles ? n_tiles : kMaxGrid / m_tiles;
  for (std::int64_t first = 0; first < n_tiles; first += at_once) {
    args.n_tiles = static_cast<int>(n_tiles - first < at_once ? n_tiles - first : at_once);
    args.batch_begin = first * Tile::kN;
    const int error = simt::launch({name, static_cast<unsigned>(args.n_tiles * m_tiles), static_cast<unsigned>(args.splits),
                                    1, Tile::kThreads, Tile::kShared, call.stream},
                                   linear_bitmap8_kernel<Tile, Sum>, args);
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace sparseprune::cuda
