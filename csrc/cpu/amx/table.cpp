// AMX: bf16 weights are expanded to tiles and multiplied as dense; only the reading of memory is sparse.
#include "cpu/avx512_bf16/expand.h"
#include "cpu/kernels.h"

namespace sparseprune::amx {
namespace {

using namespace sparseprune::avx512_bf16;

// Linear over interleaved bf16 `tile` weights.
//
//   C[16 batch rows x 16 output rows] += A[16 batch rows x 32 k] * B[16 pairs of k x 16 output rows]
//
// A packed tile, expanded, is B as tdpbf16ps wants it: row j holds the columns (2j, 2j + 1) of 16 output rows.
// Panel: tiles_bf16, so that A tiles are contiguous.
// A unit is 32 output rows. K goes in chunks: the chunk's weights are expanded once to scratch (2 KiB per 32 columns),
// and every batch row passes over them in blocks of 32 x 32 (four accumulators, two A, two B tiles: one load a product).
// Sums of a chunk wait in scratch for the next one, unless the batch fits the accumulators.
constexpr std::int64_t kUnitRows = 2 * kTileRows;
constexpr std::int64_t kTileElements = 512;  // bf16 of a tile: 1 KiB
// 32 KiB of expanded weights stay in L1 while the batch passes; a small batch has one pass and needs no more than a
// buffer between expansion and product.
constexpr std::int64_t kChunkTiles = 16;
constexpr std::int64_t kSmallChunkTiles = 4;

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads 64 bytes");

struct Scratch {
  alignas(64) bf16 weights[kChunkTiles][2][kTileElements];
  alignas(64) float stage[4][16][16];
  // then float sums[ceil(batch / 32)][4][256]
};

std::size_t scratch_bytes(const LinearJob& job) {
  return sizeof(Scratch) + static_cast<std::size_t>(ceil_div(job.batch, 32)) * 4 * 256 * sizeof(float);
}

inline const bf16* expand_tile(const std::uint16_t* masks, const bf16* values, bf16* out) {
  prefetch(reinterpret_cast<const char*>(masks) + kPrefetchBytes);
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) {
    const std::uint32_t mask = pair_mask(masks, j);
    if (j % 2 == 0) prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes);
    _mm512_store_si512(out + 32 * j, expand_pairs(values, mask));
    values += popcount(mask);
  }
  return values;
}

// C tiles 0-3: (batch tile, row tile) in two A tiles, or (parity of k, row tile) in one, to hide the product's latency.
inline void multiply_two(const bf16* a0, const bf16* a1, const bf16* w, std::int64_t tiles) {
  for (std::int64_t t = 0; t < tiles; ++t) {
    _tile_loadd(4, a0 + t * kTileElements, 64);
    _tile_loadd(6, w + 2 * t * kTileElements, 64);
    _tile_loadd(7, w + (2 * t + 1) * kTileElements, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1 + t * kTileElements, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}
inline void multiply_one(const bf16* a, const bf16* w, std::int64_t tiles) {
  for (std::int64_t t = 0; t < tiles; t += 2) {
    _tile_loadd(4, a + t * kTileElements, 64);
    _tile_loadd(6, w + 2 * t * kTileElements, 64);
    _tile_loadd(7, w + (2 * t + 1) * kTileElements, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (t + 1 == tiles) break;
    _tile_loadd(5, a + (t + 1) * kTileElements, 64);
    _tile_loadd(6, w + (2 * t + 2) * kTileElements, 64);
    _tile_loadd(7, w + (2 * t + 3) * kTileElements, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
inline void load_sums(const float* sums) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + 256, 64);
  _tile_loadd(2, sums + 512, 64);
  _tile_loadd(3, sums + 768, 64);
}
inline void store_sums(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

inline void write_rows(const LinearJob& job, std::int64_t row, std::int64_t b0, const float* sums, const float* more) {
  const int n = static_cast<int>(job.rows - row < kTileRows ? job.rows - row : kTileRows);
  const Vec bias = job.bias ? load_n(static_cast<const bf16*>(job.bias) + row, n) : zero();
  for (std::int64_t b = b0; b < job.batch && b < b0 + 16; ++b) {
    Vec sum = add(load(sums + (b - b0) * 16), bias);
    if (more) sum = add(sum, load(more + (b - b0) * 16));
    store_n(static_cast<bf16*>(job.out) + b * job.rows + row, sum, n);
  }
}

inline void unit(const LinearJob& job, std::int64_t u, Scratch& s) {
  const std::int64_t row = u * kUnitRows;
  const bool second = row + kTileRows < job.rows;
  const auto* masks = static_cast<const std::uint16_t*>(job.index) + 2 * u * job.kpad;
  const bf16* values[2] = {static_cast<const bf16*>(job.values) + job.offsets[2 * u],
                           static_cast<const bf16*>(job.values) + job.offsets[2 * u + 1]};
  const auto* panel = static_cast<const bf16*>(job.panel);
  float* sums = reinterpret_cast<float*>(&s + 1);
  const std::int64_t k_tiles = job.kpad / kTileK;
  const std::int64_t batch_tiles = ceil_div(job.batch, 16);
  const bool small = batch_tiles <= 2;  // sums never leave the tiles
  const std::int64_t chunk = small ? kSmallChunkTiles : kChunkTiles;

  for (std::int64_t t0 = 0; t0 < k_tiles; t0 += chunk) {
    const std::int64_t tiles = k_tiles - t0 < chunk ? k_tiles - t0 : chunk;
    for (std::int64_t t = 0; t < tiles; ++t) {
      values[0] = expand_tile(masks + (t0 + t) * kTileK, values[0], s.weights[t][0]);
      if (second) {
        values[1] = expand_tile(masks + job.kpad + (t0 + t) * kTileK, values[1], s.weights[t][1]);
      } else {
        std::memset(s.weights[t][1], 0, sizeof s.weights[t][1]);
      }
    }
    const bool is_first = t0 == 0, is_last = t0 + tiles == k_tiles;
    for (std::int64_t bt = 0; bt < batch_tiles; bt += 2) {
      const bf16* a0 = panel + (bt * k_tiles + t0) * kTileElements;
      const bool two = bt + 1 < batch_tiles;
      float* partial = sums + bt / 2 * 4 * 256;
      if (is_first) {
        zero_sums();
      } else if (!small) {
        load_sums(partial);
      }
      if (two) {
        multiply_two(a0, a0 + k_tiles * kTileElements, s.weights[0][0], tiles);
      } else {
        multiply_one(a0, s.weights[0][0], tiles);
      }
      if (!is_last) {
        if (!small) store_sums(partial);
        continue;
      }
      float* stage = s.stage[0][0];
      store_sums(stage);
      for (int j = 0; j < (second ? 2 : 1); ++j) {
        const float* c = stage + 256 * j;
        write_rows(job, row + kTileRows * j, bt * 16, c, two ? nullptr : c + 512);
        if (two) write_rows(job, row + kTileRows * j, bt * 16 + 16, c + 512, nullptr);
      }
    }
  }
}

void tile_amx(const LinearJob& job, std::int64_t begin, std::int64_t end, void* scratch) {
  const TileConfig config;
  __asm__ volatile("" ::"r"(&config) : "memory");  // GCC 12 takes ldtilecfg to read 8 bytes and drops the other stores
  _tile_loadconfig(&config);
  for (std::int64_t u = begin; u < end; ++u) unit(job, u, *static_cast<Scratch*>(scratch));
  _tile_release();
}

// Units are tiles of 32 columns.
void pack_tiles_bf16(const PanelJob& job, std::int64_t begin, std::int64_t end) {
  const std::int64_t k_tiles = job.kpad / kTileK;
  for (std::int64_t bt = 0; bt * 16 < job.batch; ++bt) {
    for (std::int64_t t = begin; t < end; ++t) {
      bf16* tile = static_cast<bf16*>(job.panel) + (bt * k_tiles + t) * kTileElements;
      const std::int64_t left = job.cols - t * kTileK;
      const __mmask32 m = left >= 32 ? ~0u : (1u << left) - 1u;
      for (std::int64_t i = 0; i < 16; ++i) {
        const std::int64_t b = bt * 16 + i;
        const bf16* x = static_cast<const bf16*>(job.x) + b * job.stride + t * kTileK;
        const __m512i words = b < job.batch ? _mm512_maskz_loadu_epi16(m, x) : _mm512_setzero_si512();
        _mm512_store_si512(tile + 32 * i, words);
      }
    }
  }
}

}  // namespace

void install(KernelTable& table) {
  table.isa = "amx";
  constexpr int d = static_cast<int>(DType::bf16);
  table.linear[static_cast<int>(Strategy::tile_amx)][d] = {"tile_amx", Panel::tiles_bf16, kUnitRows, scratch_bytes, tile_amx};
  table.panel[static_cast<int>(Panel::tiles_bf16)][d] = pack_tiles_bf16;
}

}  // namespace sparseprune::amx
