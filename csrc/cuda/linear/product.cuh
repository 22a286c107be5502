// What the linears over strips of 32 rows share: a configuration as constants, which part of the work is a thread's, and how
// x comes to shared memory. How the sums leave it is in product_drain.cuh.
//
// A stage holds a block of 64 columns: units of the block's strips, then x [tile_n][64], whose row n keeps its eight 16-byte
// parts at place part ^ (n % 8), so that the 8 rows of an ldmatrix matrix meet 8 different groups of banks (this is also
// wgmma's 128-byte swizzle).
#pragma once

#include <initializer_list>

#include "cuda/launchers.h"
#include "cuda/linear/product.h"
#include "cuda/simt.h"

namespace sparseprune::cuda {

struct ProductArgs {
  simt::Global<const std::uint16_t> x, bias;   // bias may be null
  simt::Global<const std::uint16_t> copied_x;  // what cp_async16 reads: x, or nothing
  simt::Global<std::uint16_t> out;
  simt::Global<float> partial;  // null for one split
  std::int64_t rows, batch, stride, copied_stride;
  std::int64_t strips;  // strips of 32 rows
  int cols, blocks;     // blocks of 64 columns
  unsigned tiles_m, tiles_n;
  bool x_vectors;    // x consists of aligned 16 bytes
  bool out_vectors;  // out (and bias) may be written 8 elements at a time, or partial 4
};

// A configuration as constants. Weight: kUnitBytes, those of a unit in a stage, and kConfigs.
template <typename Weight, int CONFIG>
struct ProductTile {
  static constexpr ProductConfig kConfig = Weight::kConfigs[CONFIG];
  static constexpr int kWarpsM = kConfig.warps_m, kWarpsN = kConfig.warps_n, kWarpsK = kConfig.warps_k;
  static constexpr int kUnits = kConfig.units, kTilesN = kConfig.n_tiles;
  static constexpr int kTileM = kConfig.tile_m(), kTileN = kConfig.tile_n();
  static constexpr int kThreads = kConfig.threads(), kGroup = kThreads / kWarpsK;
  // Groups that meet at a barrier have equally many rounds, the last one perhaps without a block of columns for some.
  static constexpr bool kAlone = kGroup == 32 || kWarpsK == 1;

  static constexpr int kBlockUnits = kWarpsM * kUnits;
  static constexpr int kRowBytes = kUnitCols * 2;  // in a row of x
  static constexpr int kX = kBlockUnits * Weight::kUnitBytes;
  static constexpr int kStages = kConfig.stages_of(Weight::kUnitBytes);
  static constexpr int kStageBytes = kConfig.stage_bytes(Weight::kUnitBytes);
  static constexpr int kShared = kStages * kWarpsK * kStageBytes;

  // Copies of 16 bytes of x by each thread of a group.
  static constexpr int kXRows = kGroup / 8, kXCopies = kTileN / kXRows;

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

  static_assert(kXCopies * kXRows == kTileN && kXRows % 4 == 0, "a group copies x in whole rows");
  static_assert(kX % 128 == 0 && kStageBytes % 128 == 0, "the swizzle works on bits 4 to 6 of an address");
  static_assert(kPassTiles * kPasses == kTilesN && kPassTiles > 0, "passes are equal");
  static_assert(kStages >= 2, "a stage arrives while another is in use, on every card");
};

// Where a thread's work lies.
struct ProductPlace {
  int thread;  // within its K group
  int k_group, warp_m, warp_n;
  std::int64_t strip, n;   // the first of the block's tile
  int units, x_rows;       // as many as the tile has
  int copied_rows;         // x_rows, or 0 where x is gathered
  int b_byte;              // within a stage: the first of this lane's operand B
  int x_byte;              // within a stage: the first of this thread's copies of x
  int first, rounds, end;  // the K group's blocks of columns: first, first + warps_k, .. below end
};

// Byte of part `part` (8 columns) of row n of x, in a stage.
template <typename C>
SP_DEVICE int product_x_byte(int n, int part) {
  return C::kX + n * C::kRowBytes + (part ^ n % 8) * 16;
}

template <typename C>
SP_DEVICE ProductPlace product_place(const ProductArgs& a) {
  const int thread = static_cast<int>(simt::thread_x()), lane = thread % 32;
  ProductPlace p;
  p.thread = C::kWarpsK == 1 ? thread : thread % C::kGroup;
  p.k_group = C::kWarpsK == 1 ? 0 : thread / C::kGroup;
  p.warp_m = p.thread / 32 % C::kWarpsM;
  p.warp_n = p.thread / 32 / C::kWarpsM;
  p.b_byte = product_x_byte<C>(p.warp_n * C::kTilesN * 8 + lane % 8, lane / 8);  // matrix lane / 8 of an ldmatrix: 8 columns
  p.x_byte = product_x_byte<C>(p.thread / 8, p.thread % 8);
  // Blocks that run at the same time lie in a near square of about 2048 rows, so that L2 serves most reads of both operands:
  // down the rows of a band first, then along the batch.
  constexpr unsigned kBand = 2048 / C::kTileM;
  const unsigned most = kBand < a.tiles_m ? kBand : a.tiles_m, id = simt::block_x();
  const unsigned band = id / (most * a.tiles_n), within = id % (most * a.tiles_n);
  const unsigned left = a.tiles_m - band * most, height = left < most ? left : most;
  p.strip = static_cast<std::int64_t>(band * most + within % height) * C::kBlockUnits;
  p.n = static_cast<std::int64_t>(within / height) * C::kTileN;
  p.units = static_cast<int>(a.strips - p.strip < C::kBlockUnits ? a.strips - p.strip : C::kBlockUnits);
  p.x_rows = static_cast<int>(a.batch - p.n < C::kTileN ? a.batch - p.n : C::kTileN);
  p.copied_rows = a.x_vectors ? p.x_rows : 0;
  const std::int64_t split = simt::block_y(), splits = simt::grid_y();
  const int begin = static_cast<int>(a.blocks * split / splits);
  p.end = static_cast<int>(a.blocks * (split + 1) / splits);
  p.first = begin + p.k_group;
  p.rounds = (p.end - begin - (C::kAlone ? p.k_group : 0) + C::kWarpsK - 1) / C::kWarpsK;
  return p;
}

// Place in a stage of a thread's part of row thread / 8 + `rows` of x. The swizzle of rows 4 further on is one bit away.
template <typename C>
SP_DEVICE int product_x_copy_byte(const ProductPlace& p, int rows) {
  return (p.x_byte ^ rows % 8 * 16) + rows * C::kRowBytes;
}

// The first part of x that a thread copies of a block of columns.
SP_DEVICE simt::Global<const std::uint16_t> product_x(const ProductArgs& a, const ProductPlace& p, int block) {
  return a.copied_x + ((p.n + p.thread / 8) * a.copied_stride + std::int64_t{block} * kUnitCols + p.thread % 8 * 8);
}

// Copy i of kXCopies. from: product_x; columns: those from there to the last. What there is not becomes zeros.
template <typename C>
SP_DEVICE void product_copy_x(const ProductArgs& a, const ProductPlace& p, simt::Global<const std::uint16_t> from,
                              int columns, simt::Shared<std::uint8_t> stage, bool more, int i) {
  const int rows = i * C::kXRows;
  const bool there = more && columns > 0 && p.thread / 8 + rows < p.copied_rows;
  simt::cp_async16(stage + product_x_copy_byte<C>(p, rows), from + rows * a.copied_stride, there ? 16 : 0);
}

// In place of the zeros that were copied, x, where its rows do not consist of whole, aligned 16 bytes. After the wait: each
// thread overwrites its own copies. Slow, and here so that the loop of all other calls has no branch.
template <typename C>
SP_DEVICE void product_gather_x(const ProductArgs& a, const ProductPlace& p, simt::Shared<std::uint8_t> stage, int block) {
  const std::int64_t col = std::int64_t{block} * kUnitCols + p.thread % 8 * 8;
  SP_ROLL
  for (int rows = 0; rows < C::kTileN; rows += C::kXRows) {
    const int n = p.thread / 8 + rows;
    const auto from = a.x + ((p.n + n) * a.stride + col);
    std::uint32_t v[8];
    SP_UNROLL
    for (int e = 0; e < 8; ++e) v[e] = n < p.x_rows && col + e < a.cols ? simt::load<std::uint16_t>(from + e) : 0;
    simt::store(stage + product_x_copy_byte<C>(p, rows),
                simt::u32x4{v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16});
  }
}

// Of the stage that follows `stage` in the ring.
template <typename C>
SP_DEVICE int product_after(int stage) {
  return stage == (C::kStages - 1) * C::kStageBytes ? 0 : stage + C::kStageBytes;
}

// The barrier of those who share a stage.
template <typename C>
SP_DEVICE void product_sync() {
  if constexpr (C::kGroup == 32) {
    simt::sync_warp();
  } else {
    simt::sync_block();
  }
}

// A warp's sums: [unit][tile of 16 rows][tile of 8 batch rows][register]
template <typename C>
using ProductSums = float[C::kUnits][2][C::kTilesN][4];

template <typename C, typename Args>
Args product_args(const LinearCall& call) {
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  const bool one = call.plan.splits == 1;
  Args a{};
  a.x = static_cast<const std::uint16_t*>(call.x);
  a.bias = static_cast<const std::uint16_t*>(one ? call.bias : nullptr);
  a.out = static_cast<std::uint16_t*>(one ? call.out : nullptr);
  a.partial = static_cast<float*>(one ? nullptr : call.workspace);
  a.rows = call.rows, a.batch = call.batch, a.stride = call.stride;
  a.strips = ceil_div(call.rows, kUnitRows);
  a.cols = static_cast<int>(call.cols);
  a.blocks = static_cast<int>(ceil_div(call.cols, kUnitCols));  // 0 without columns: the sums are then zero
  a.tiles_m = static_cast<unsigned>(ceil_div(call.rows, C::kTileM));
  a.tiles_n = static_cast<unsigned>(ceil_div(call.batch, C::kTileN));
  a.x_vectors = aligned(call.x) && call.cols % 8 == 0 && (call.stride % 8 == 0 || call.batch == 1);
  // Where nothing of x is copied, copies of no bytes still name an aligned address.
  a.copied_x = a.x_vectors ? a.x : reinterpret_cast<const std::uint16_t*>(call.packed);
  a.copied_stride = a.x_vectors ? a.stride : 0;
  a.out_vectors = call.rows % 8 == 0 && (one ? aligned(call.out) && aligned(call.bias) : aligned(call.workspace));
  return a;
}

// A kernel's name in reports (linear_sparse24_bf16_n8_m32_k8), put together by the compiler.
struct ProductName {
  char text[64] = {};
  constexpr explicit ProductName(std::initializer_list<const char*> parts) {
    int size = 0;
    for (const char* part : parts) {
      for (; *part; ++part) text[size++] = *part;
    }
  }
};

// A tile is 256 outputs at least, so that 2^31 of them would be a terabyte.
template <typename C>
simt::Grid product_grid(const char* name, const ProductArgs& a, const LinearCall& call) {
  return {name,
          a.tiles_m * a.tiles_n,
          static_cast<unsigned>(call.plan.splits),
          1,
          static_cast<unsigned>(C::kThreads),
          static_cast<unsigned>(C::kShared),
          call.stream};
}

}  // namespace sparseprune::cuda
