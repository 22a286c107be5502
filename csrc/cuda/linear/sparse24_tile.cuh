// linear_sparse24.cuh: a configuration as constants, and which part of the work is a thread's.
#pragma once

#include "cuda/launchers.h"
#include "cuda/linear/sparse24.h"
#include "cuda/simt.h"

namespace sparseprune::cuda {

struct Sparse24Args {
  simt::Global<const std::uint8_t> values, metadata;
  simt::Global<const std::uint16_t> x, bias;   // bias may be null
  simt::Global<const std::uint16_t> copied_x;  // what cp_async16 reads: x, or nothing
  simt::Global<std::uint16_t> out;
  simt::Global<float> partial;  // null for one split
  std::int64_t rows, batch, stride, copied_stride;
  std::int64_t strips;  // strips of 32 rows
  int cols, blocks;     // blocks of 64 columns
  unsigned tiles_m, tiles_n;
  std::int64_t strip_bytes;  // values of a strip
  bool x_vectors;            // x consists of aligned 16 bytes
  bool out_vectors;          // out (and bias) may be written 8 elements at a time, or partial 4
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
  static constexpr int kValueBytes = sparse24::kValues * 2, kMetadataBytes = sparse24::kWords * 4;  // in a unit
  static constexpr int kRowBytes = sparse24::kCols * 2;                                             // in a row of x
  static constexpr int kMetadata = kBlockUnits * kValueBytes, kX = kMetadata + kBlockUnits * kMetadataBytes;
  static constexpr int kStageBytes = kConfig.stage_bytes();
  static constexpr int kShared = kConfig.shared_bytes();

  // Copies of 16 bytes by each thread of a group: values, metadata (one, by the first threads), x.
  static constexpr int kValueCopies = kBlockUnits * kValueBytes / 16 / kGroup;
  static constexpr int kMetadataThreadsOfUnit = kMetadataBytes / 16, kMetadataThreads = kBlockUnits * kMetadataThreadsOfUnit;
  static constexpr int kXRows = kGroup / 8, kXCopies = kTileN / kXRows;
  static constexpr int kCopies = kValueCopies + 1 + kXCopies;

  // A round is 2 x kTilesN slots: a step of 32 columns and a tile of 8 batch rows each. Copies are spread over the first
  // ones, so that tensor cores need not wait for their issue; with two stages over fewer, for they must land by the round's
  // end.
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
  int thread;  // within its K group
  int k_group, warp_m, warp_n;
  std::int64_t strip, n;       // the first of the block's tile
  int units, x_rows;           // as many as the tile has
  int copied_rows;             // x_rows, or 0 where x is gathered
  int a_byte, e_byte, b_byte;  // within a stage: the first of this lane's operands
  int x_byte;                  // within a stage: the first of this thread's copies of x
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
  p.b_byte =
      sparse24_x_byte<C>(p.warp_n * C::kTilesN * 8 + lane % 8, lane / 8);  // matrix lane / 8 of an ldmatrix: 8 columns
  p.x_byte = sparse24_x_byte<C>(p.thread / 8, p.thread % 8);
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
  return p;
}

// A warp's sums: [unit][tile of 16 rows][tile of 8 batch rows][register]
template <typename C>
using Sparse24Sums = float[C::kUnits][2][C::kTilesN][4];

}  // namespace sparseprune::cuda
