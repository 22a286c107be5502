// The walk over a weight in layout bitmap8, shared by the linears that multiply by tensor cores (linear_bitmap8.cu) and by
// multiply-adds (linear_bitmap8_f32.cu): they differ in Sum, which multiplies one unit.
//
// Equation       out[b][r] = bias[r] + sum over the kept (r, c) of weight[r][c] * x[b][c], in float32.
// Operands       weight: units of 16 rows x 64 columns, [strip of rows][block of columns] (core/layouts/bitmap8.h): offsets int64
//                [units + 1], 128 bytes of bitmaps each, values in the order of the bits, each unit's from 16 bytes on.
//                x [batch, cols], rows `stride` elements apart; bias [rows] or null; out [batch, rows].
//                With splits > 1 instead of out: workspace float32 [splits, batch, rows], no bias.
// Preconditions  the blob and its sections aligned to 16 bytes, x to its elements. Offsets and bitmaps are not trusted:
//                whatever they hold, no access leaves the blob or the block's shared memory.
// Partition      A block has M = 16 WARPS_M rows, N batch rows, and the columns of its split. Warp (wm, wk) walks strip wm
//                and takes, all in step, every WARPS_K-th block of columns:
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
//                Grid: x batch rows, y rows, z splits: neighbours read the same weights, one of them from memory.
// Constants      Memory needs some 20 KB under way per SM (H100: 25 bytes a ns, 700 ns). At 50 % a unit is 1.1 KB: 8 warps
//                with 2 stages ahead are enough on any card, and at 78 KB an SM of 164 KB or more has two such blocks.
//                99 KB is what a block may have on sm_86, 89 and 120.
#pragma once

#include <cstring>

#include "core/layouts/bitmap8.h"
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
  // Rows of x: 16 bytes more than they need, so that ldmatrix finds 8 rows in all 32 banks. float32 reads a row at a time.
  static constexpr int kXChunks = bitmap8::kCols * kItem / 16, kXPitch = bitmap8::kCols * kItem + (kItem == 2 ? 16 : 0);
  static constexpr int kXFirst = WARPS_M * WARPS_K * kSlot, kStage = kXFirst + WARPS_K * kN * kXPitch,
                       kRing = STAGES * kStage;
  // Sums [WARPS_K][N][kPitch]: 2 kPitch is 8 modulo 32 banks, so that 4 quads 2 batch rows apart, 8 rows each, meet in none.
  static constexpr int kPitch = kM + 4, kSumBytes = WARPS_K * kN * kPitch * 4;
  static constexpr int kShared = kRing > kSumBytes ? kRing : kSumBytes;

  static constexpr int kXRows = kGroup / kXChunks;  // batch rows that a group copies at once
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
  std::int64_t row_begin;        // where this launch starts
  int strips, blocks;            // strips of 16 rows, blocks of 64 columns
  int split_blocks, split_more;  // blocks of a split, and how many splits have one more: a kernel divides slowly
  bool x_aligned;                // every row of x to 16 bytes
};

// What a block and a warp of it are to do.
template <typename Tile>
struct Bitmap8Task {
  std::int64_t row, batch;  // the block's first
  int batch_rows;
  int begin, end;  // the block's columns / 64
  int warp_m, warp_k;

  SP_DEVICE explicit Bitmap8Task(const Bitmap8Args<Tile>& args) {
    row = args.row_begin + static_cast<std::int64_t>(simt::block_y()) * Tile::kM;
    batch = static_cast<std::int64_t>(simt::block_x()) * Tile::kN;
    batch_rows = args.batch - batch < Tile::kN ? static_cast<int>(args.batch - batch) : Tile::kN;
    warp_m = static_cast<int>(simt::warp()) % Tile::kWarpsM;
    warp_k = static_cast<int>(simt::warp()) / Tile::kWarpsM;
    const int split = static_cast<int>(simt::block_z());
    begin = split * args.split_blocks + (split < args.split_more ? split : args.split_more);
    end = begin + args.split_blocks + (split < args.split_more ? 1 : 0);
  }
};

// Fills the ring. All that a thread needs again and again it keeps, places in shared memory among it.
template <typename Tile>
class Bitmap8Stream {
  using Word = typename Tile::Word;
  static constexpr int kWindow = 32;
  static constexpr int kCopies = Tile::kN / Tile::kXRows;  // rows of x that a thread has a chunk of

 public:
  // x_lane: where in an x tile this lane begins to read.
  SP_DEVICE Bitmap8Stream(const Bitmap8Args<Tile>& args, const Bitmap8Task<Tile>& task, unsigned x_lane) : args_(args) {
    const int lane = static_cast<int>(simt::lane()), thread = static_cast<int>(simt::thread_x()) % Tile::kGroup;
    const int chunk = thread % Tile::kXChunks, row = thread / Tile::kXChunks;
    const int begin = task.begin + task.warp_k, blocks = task.end - begin;
    // A warp past the last strip does that again: nothing of it is written.
    const std::int64_t own = task.row / bitmap8::kRows + task.warp_m;
    const std::int64_t strip = own < args.strips ? own : args.strips - 1;
    const unsigned slot = simt::shared_base() + simt::warp() * Tile::kSlot;
    const unsigned x = simt::shared_base() + Tile::kXFirst + task.warp_k * Tile::kN * Tile::kXPitch;
    lane_ = lane;
    units_ = blocks > 0 ? (blocks + Tile::kWarpsK - 1) / Tile::kWarpsK : 0;
    put_slot_ = keep(slot + 16 * lane);
    x_ = keep(x + x_lane);
    put_x_ = keep(x + row * Tile::kXPitch + 16 * chunk);
    index_ = args.index + ((strip * args.blocks + begin) * Tile::kBitmapBytes + 16 * lane);
    next_ = window(0, 0);
    x_from_ = args.x + ((task.batch + row) * args.stride + std::int64_t{begin} * bitmap8::kCols + chunk * Tile::kPer16);
    x_left_ = static_cast<int>(args.cols - std::int64_t{begin} * bitmap8::kCols) - chunk * Tile::kPer16;
    x_rows_ = task.batch_rows > row ? (task.batch_rows - row + Tile::kXRows - 1) / Tile::kXRows : 0;
    // Batch rows that are not there: zeros, once.
    for (int j = x_rows_; j < kCopies; ++j) {
      for (int stage = 0; stage < Tile::kStages; ++stage) {
        simt::store(at(x_place(j) + stage * Tile::kStage), simt::u32x4{0, 0, 0, 0});
      }
    }
  }

  // Whether this warp has a unit in iteration i.
  SP_DEVICE bool has_unit(int i) const {
    return static_cast<unsigned>(i) < static_cast<unsigned>(units_);
  }
  // Of the stage to be worked on, once the next has been set under way.
  SP_DEVICE unsigned slot() const {
    return put_slot_ - 16 * simt::lane();
  }
  SP_DEVICE unsigned x() const {
    return x_;
  }

  // Sets under way what iteration i needs. Every i once, in order.
  SP_DEVICE void fetch(int i) {
    if (static_cast<unsigned>(i) % kWindow == 0) {
      now_ = next_;
      next_ = window(i, kWindow);
    }
    const std::uint32_t mine = simt::shuffle(now_.mine, static_cast<int>(static_cast<unsigned>(i) % kWindow));
    const int chunks = static_cast<int>(mine & 255u) * (8 / Tile::kPer16), left = chunks - lane_;
    const auto values = now_.values + static_cast<std::uint64_t>(mine >> 8) * 8;
    const bool x_whole = i < units_ && args_.x_aligned && x_left_ >= Tile::kPer16;
    SP_UNROLL
    for (int j = 0; j < Tile::kValueBytes / 512; ++j) {
      if (left > 32 * j) simt::cp_async16(at(put_slot_ + 512 * j), values + 32 * Tile::kPer16 * j, 16);
    }
    if (i < units_ && lane_ < Tile::kBitmapBytes / 16) simt::cp_async16(at(put_slot_ + Tile::kValueBytes), index_, 16);
    SP_UNROLL
    for (int j = 0; j < kCopies; ++j) {
      if (x_whole && j < x_rows_) simt::cp_async16(at(x_place(j)), x_from_ + j * (Tile::kXRows * args_.stride), 16);
    }
    // A lane with nothing to take looks up to 2 past the last value.
    if (i < units_ && lane_ == 0 && chunks < Tile::kValueBytes / 16) {
      simt::store(at(put_slot_ + 16 * chunks), simt::u32x4{0, 0, 0, 0});
    }
    if (i < units_ && !x_whole) gather_x();

    index_ += Tile::kWarpsK * Tile::kBitmapBytes;
    x_from_ += Tile::kWarpsK * bitmap8::kCols;
    x_left_ -= Tile::kWarpsK * bitmap8::kCols;
    const bool last = ++stage_ == Tile::kStages;
    const unsigned step = static_cast<unsigned>(last ? Tile::kStage - Tile::kRing : Tile::kStage);
    stage_ = last ? 0 : stage_;
    put_slot_ += step, x_ += step, put_x_ += step;
  }

 private:
  // Where the values of 32 units of this warp lie.
  struct Window {
    simt::Global<const Word> values;  // the first one's, from this lane's chunk on
    std::uint32_t mine;               // in iteration i + lane: distance from it << 8 | length, in eights
  };

  // The offset of the unit that comes `ahead` iterations after that of index_, or of the one behind it: a multiple of 8
  // within the blob, whatever it holds.
  SP_DEVICE std::int64_t offset(int ahead, int behind) const {
    const std::int64_t unit = (static_cast<std::int64_t>(index_ - args_.index) - 16 * lane_) / Tile::kBitmapBytes;
    const std::int64_t v = args_.offsets[unit + ahead * Tile::kWarpsK + behind];
    return (v < 0 ? 0 : v > args_.stored ? args_.stored : v) & ~std::int64_t{7};
  }

  // Of iterations i + ahead and up, index_ being at i.
  SP_DEVICE Window window(int i, int ahead) const {
    Window w{args_.values, 0};
    if (!has_unit(i + ahead)) return w;
    const std::int64_t first = offset(ahead, 0);
    w.values = args_.values + (first + lane_ * Tile::kPer16);
    ahead += lane_;
    if (!has_unit(i + ahead)) return w;
    const std::int64_t begin = offset(ahead, 0), far = begin - first, length = offset(ahead, 1) - begin;
    static_assert(kWindow * Tile::kWarpsK * 128 < 1 << 24, "distances, in eights of values, fit their 24 bits");
    if (far < 0 || far >= std::int64_t{8} << 24 || length < 0) return w;
    w.mine = static_cast<std::uint32_t>(far / 8) << 8 | static_cast<std::uint32_t>(length < 1024 ? length / 8 : 128);
    return w;
  }

  static SP_DEVICE simt::Shared<std::uint8_t> at(unsigned place) {
    return simt::shared_at<std::uint8_t>(place);
  }
  SP_DEVICE unsigned x_place(int j) const {
    return put_x_ + j * Tile::kXRows * Tile::kXPitch;
  }

  // x at any alignment, and zeros past its last column.
  SP_DEVICE void gather_x() const {
    for (int j = 0; j < x_rows_; ++j) {
      const auto from = x_from_ + j * (Tile::kXRows * args_.stride);
      std::uint32_t w[4] = {};
      SP_UNROLL
      for (int e = 0; e < Tile::kPer16; ++e) {
        if (e >= x_left_) continue;
        w[e * Tile::kItem / 4] |= static_cast<std::uint32_t>(from[e]) << 8 * Tile::kItem * (e % (4 / Tile::kItem));
      }
      simt::store(at(x_place(j)), simt::u32x4{w[0], w[1], w[2], w[3]});
    }
  }

  const Bitmap8Args<Tile>& args_;
  // In the stage to be filled: the places of the warp and of its group, and of what this thread copies.
  unsigned put_slot_, x_, put_x_;
  int lane_, stage_ = 0;
  int units_;  // this warp's
  Window now_{}, next_{};
  simt::Global<const std::uint8_t> index_;  // the next chunk of bitmaps
  simt::Global<const Word> x_from_;         // and of x, in the first of x_rows_ rows
  int x_left_, x_rows_;                     // x_left_: columns from that chunk on
};

// The sums of all warps from shared memory, added up and written. Threads go along rows: out has them side by side.
template <typename Tile>
SP_DEVICE void write_sums(const Bitmap8Args<Tile>& args, const Bitmap8Task<Tile>& task) {
  const auto sums = simt::shared_memory<float>(0);
  const int count = Tile::kM * task.batch_rows;
  for (int e = static_cast<int>(simt::thread_x()); e < count; e += Tile::kThreads) {
    const int n = e / Tile::kM, m = e % Tile::kM;
    const std::int64_t row = task.row + m, batch = task.batch + n;
    if (row >= args.rows) continue;
    float sum = 0;
    SP_UNROLL
    for (int k = 0; k < Tile::kWarpsK; ++k) sum += simt::load<float>(sums + ((k * Tile::kN + n) * Tile::kPitch + m));
    if (args.workspace) {
      args.workspace[(simt::block_z() * args.batch + batch) * args.rows + row] = sum;
    } else {
      if (args.bias) sum += simt::to_float(simt::load<typename Tile::T>(args.bias + row));
      args.out[batch * args.rows + row] = simt::from_float<typename Tile::T>(sum);
    }
  }
}

// Sum: of one warp, [N][16 rows].
//   x_lane()                 what of an x tile a lane reads, its first byte
//   add(me, unit, slot, x)   plus the product of a unit, whose values are at slot, and an x tile; x: that of this lane
//   put(first)               into shared memory as float [N][kPitch], from byte offset `first`
template <typename Tile, typename Sum>
SP_KERNEL SP_THREADS(Tile::kThreads, Tile::kBlocks) linear_bitmap8_kernel(const Bitmap8Args<Tile> args) {
  const Bitmap8Task<Tile> task(args);
  Bitmap8Stream<Tile> stream(args, task, Sum::x_lane());
  const Bitmap8Lane me = bitmap8_lane();
  Sum sum;

  const int iterations = (task.end - task.begin + Tile::kWarpsK - 1) / Tile::kWarpsK;
  for (int i = 1 - Tile::kStages; i < iterations; ++i) {
    // Stage i has landed, for all who share it, and nobody reads the one before any more.
    simt::cp_async_wait<Tile::kStages - 2>();
    if constexpr (Tile::kWarpsM == 1) {
      simt::sync_warp();
    } else {
      simt::sync_block();
    }
    stream.fetch(i + Tile::kStages - 1);
    simt::cp_async_commit();
    if (stream.has_unit(i)) {
      const unsigned slot = stream.slot();
      sum.add(me, index_unit(me, simt::shared_at<std::uint8_t>(slot + Tile::kValueBytes + me.byte)), slot, stream.x());
    }
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
  constexpr std::int64_t kMaxGrid = 65535;  // the most along its y
  const std::int64_t m_tiles = ceil_div(call.rows, Tile::kM), n_tiles = ceil_div(call.batch, Tile::kN);
  const std::int64_t stride = call.batch == 1 ? 0 : call.stride;  // with one row it says nothing

  Bitmap8Args<Tile> args{};
  args.offsets = reinterpret_cast<const std::int64_t*>(call.packed + geometry.offsets);
  args.index = call.packed + geometry.index;
  args.values = reinterpret_cast<const Word*>(call.packed + geometry.values);
  args.x = static_cast<const Word*>(call.x);
  args.bias = static_cast<const T*>(call.bias);
  args.out = static_cast<T*>(call.out);
  if (call.plan.splits > 1) args.workspace = static_cast<float*>(call.workspace);
  args.stored = (geometry.total - geometry.total % kAlign - geometry.values) / Tile::kItem;
  args.rows = call.rows, args.cols = call.cols, args.batch = call.batch, args.stride = stride;
  args.strips = static_cast<int>(ceil_div(call.rows, bitmap8::kRows));
  args.blocks = static_cast<int>(geometry.kpad / bitmap8::kCols);
  args.split_blocks = args.blocks / call.plan.splits, args.split_more = args.blocks % call.plan.splits;
  args.x_aligned = reinterpret_cast<std::uintptr_t>(call.x) % 16 == 0 && stride * Tile::kItem % 16 == 0;

  // One launch, but for more than 2^20 rows.
  for (std::int64_t first = 0; first < m_tiles; first += kMaxGrid) {
    const std::int64_t count = m_tiles - first < kMaxGrid ? m_tiles - first : kMaxGrid;
    args.row_begin = first * Tile::kM;
    const int error = simt::launch({name, static_cast<unsigned>(n_tiles), static_cast<unsigned>(count),
                                    static_cast<unsigned>(call.plan.splits), Tile::kThreads, Tile::kShared, call.stream},
                                   linear_bitmap8_kernel<Tile, Sum>, args);
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace sparseprune::cuda
