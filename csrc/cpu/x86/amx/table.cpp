// AMX: bf16 weights are expanded to tiles and multiplied as dense; only the reading of memory is sparse.
#include "cpu/kernels.h"
#include "cpu/x86/avx512_bf16/expand.h"

namespace sparseprune::amx {
namespace {

using namespace sparseprune::avx512_bf16;

// Linear over interleaved bf16 `tile` weights.
//
//   C[16 batch rows x 16 output rows] += A[16 batch rows x 32 k] * B[16 pairs of k x 16 output rows]
//
// A packed tile, expanded, is B as tdpbf16ps wants it: row j holds the columns (2j, 2j + 1) of 16 output rows.
// Panel: tiles_bf16, so that A tiles are contiguous.
// A unit is 32 output rows; a block of 32 x 32 sums takes four accumulators, two A and two B tiles: one load per product.
constexpr std::int64_t kUnitRows = 2 * kTileRows;
constexpr std::int64_t kTileElements = 512;    // bf16 of a tile: 1 KiB
constexpr std::int64_t kPairSums = 4 * 256;    // floats of a block
constexpr std::int64_t kChunkTiles = 32;       // 64 KiB of expanded weights; longer chunks spare traffic of sums
constexpr std::int64_t kRing = 4;              // buffers between expansion and product
constexpr std::int64_t kPanelInL2 = 1 << 20;   // a panel up to this stays in L2 whole
constexpr std::int64_t kGroupBytes = 3 << 19;  // sums of a group, beside the panel's chunk in L2
constexpr std::int64_t kMaxGroup = 32;
constexpr std::int64_t kPrefetchLines = 8;  // a column tile's values at 50 % (a guess that serves the others)

constexpr std::int64_t group_size(std::int64_t batch, std::int64_t kpad) {
  if (batch * kpad * 2 <= kPanelInL2) return 1;  // nothing to keep: stream each unit's weights front to back
  const std::int64_t fits = kGroupBytes / (ceil_div(batch, 32) * kPairSums * 4);
  return fits < 1 ? 1 : fits < kMaxGroup ? fits : kMaxGroup;
}

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
  // then float sums[group][ceil(batch / 32)][kPairSums]
};

std::size_t scratch_bytes(const LinearJob& job) {
  const std::int64_t blocks = job.batch <= 32 ? 0 : group_size(job.batch, job.kpad) * ceil_div(job.batch, 32);
  return sizeof(Scratch) + static_cast<std::size_t>(blocks * kPairSums) * sizeof(float);
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

// One column tile of 32 columns. C tiles 0-3: (batch tile, row tile) with two A tiles, or (parity of t, row tile) with
// one, so that four products are always under way.
inline void multiply(const bf16* a0, const bf16* a1, const bf16* w, std::int64_t t) {
  _tile_loadd(6, w, 64);
  _tile_loadd(7, w + kTileElements, 64);
  _tile_loadd(4, a0 + t * kTileElements, 64);
  if (a1) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1 + t * kTileElements, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  } else if (t % 2 == 0) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  } else {
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 7);
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

// The compressed tiles of a unit, expanded column tile by column tile.
struct UnitReader {
  const std::uint16_t* masks[2];
  const bf16* values[2];
  bool second;

  UnitReader() = default;
  UnitReader(const LinearJob& job, std::int64_t u) {
    second = u * kUnitRows + kTileRows < job.rows;
    for (int j = 0; j < 2; ++j) {
      masks[j] = static_cast<const std::uint16_t*>(job.index) + (2 * u + j) * job.kpad;
      values[j] = static_cast<const bf16*>(job.values) + job.offsets[2 * u + j];
    }
  }
  void expand(bf16* out) {
    values[0] = expand_tile(masks[0], values[0], out);
    masks[0] += kTileK;
    if (second) {
      values[1] = expand_tile(masks[1], values[1], out + kTileElements);
      masks[1] += kTileK;
    } else {
      std::memset(out + kTileElements, 0, kTileElements * sizeof(bf16));
    }
  }
  // The i-th part of what the next chunk reads.
  void prefetch(std::int64_t i) const {
    if (i >= kChunkTiles * kPrefetchLines) return;
    for (int j = 0; j < 2; ++j) {
      avx512::prefetch(reinterpret_cast<const char*>(values[j]) + 64 * i);
      if (i < kChunkTiles) avx512::prefetch(reinterpret_cast<const char*>(masks[j]) + 64 * i);
    }
  }
};

void write_unit(const LinearJob& job, std::int64_t u, std::int64_t batch_tile, bool two, float* stage) {
  store_sums(stage);
  for (std::int64_t row = u * kUnitRows; row < job.rows && row < (u + 1) * kUnitRows; row += kTileRows) {
    const float* c = stage + (row - u * kUnitRows) * 16;
    write_rows(job, row, batch_tile * 16, c, two ? nullptr : c + 512);
    if (two) write_rows(job, row, batch_tile * 16 + 16, c + 512, nullptr);
  }
}

// Expands `tiles` column tiles and multiplies each by one pair of batch tiles. Expansion runs one tile ahead of the
// product, so that the product reads what has reached the cache and memory is read while products run.
inline void expand_multiply(UnitReader& reader, const bf16* a0, const bf16* a1, std::int64_t tiles, std::int64_t ring,
                            Scratch& s) {
  reader.expand(s.weights[0][0]);
  for (std::int64_t t = 0; t < tiles; ++t) {
    if (t + 1 < tiles) reader.expand(s.weights[(t + 1) % ring][0]);
    multiply(a0, a1, s.weights[t % ring][0], t);
  }
}

// Up to 32 batch rows: the sums never leave the tiles.
void unit_small(const LinearJob& job, std::int64_t u, Scratch& s) {
  const auto* a0 = static_cast<const bf16*>(job.panel);
  const std::int64_t k_tiles = job.kpad / kTileK;
  const bool two = job.batch > 16;
  UnitReader reader(job, u);
  zero_sums();
  expand_multiply(reader, a0, two ? a0 + k_tiles * kTileElements : nullptr, k_tiles, kRing, s);
  write_unit(job, u, 0, two, s.stage[0][0]);
}

// More batch rows: groups of units x chunks of K. The chunk's panel stays in L2 while the group's units pass over it;
// each unit's chunk is expanded once and meets every batch row. Sums of a chunk wait in scratch for the next.
void group_large(const LinearJob& job, std::int64_t begin, std::int64_t end, Scratch& s) {
  const auto* panel = static_cast<const bf16*>(job.panel);
  const std::int64_t k_tiles = job.kpad / kTileK;
  const std::int64_t batch_tiles = ceil_div(job.batch, 16), pairs = ceil_div(batch_tiles, 2);
  float* sums = reinterpret_cast<float*>(&s + 1);
  UnitReader readers[kMaxGroup];
  for (std::int64_t u = begin; u < end; ++u) readers[u - begin] = UnitReader(job, u);

  for (std::int64_t t0 = 0; t0 < k_tiles; t0 += kChunkTiles) {
    const std::int64_t tiles = k_tiles - t0 < kChunkTiles ? k_tiles - t0 : kChunkTiles;
    const bool is_first = t0 == 0, is_last = t0 + tiles == k_tiles;
    for (std::int64_t u = begin; u < end; ++u) {
      const UnitReader& following = readers[u + 1 < end ? u + 1 - begin : 0];
      for (std::int64_t p = 0; p < pairs; ++p) {
        const bf16* a0 = panel + (2 * p * k_tiles + t0) * kTileElements;
        const bool two = 2 * p + 1 < batch_tiles;
        const bf16* a1 = two ? a0 + k_tiles * kTileElements : nullptr;
        float* partial = sums + ((u - begin) * pairs + p) * kPairSums;
        if (is_first) {
          zero_sums();
        } else {
          load_sums(partial);
        }
        if (p == 0) {
          expand_multiply(readers[u - begin], a0, a1, tiles, kChunkTiles, s);
        } else {
          for (std::int64_t t = 0; t < tiles; ++t) {
            // Products leave memory idle: fetch what the next unit expands.
            following.prefetch((p - 1) * tiles + t);
            multiply(a0, a1, s.weights[t][0], t);
          }
        }
        if (is_last) {
          write_unit(job, u, 2 * p, two, s.stage[0][0]);
        } else {
          store_sums(partial);
        }
      }
    }
  }
}

void tile_amx(const LinearJob& job, std::int64_t begin, std::int64_t end, void* scratch) {
  const TileConfig config;
  __asm__ volatile("" ::"r"(&config) : "memory");  // GCC 12 takes ldtilecfg to read 8 bytes and drops the other stores
  _tile_loadconfig(&config);
  auto& s = *static_cast<Scratch*>(scratch);
  if (job.batch <= 32) {
    for (std::int64_t u = begin; u < end; ++u) unit_small(job, u, s);
  } else {
    const std::int64_t group = group_size(job.batch, job.kpad);
    for (std::int64_t u = begin; u < end; u += group) group_large(job, u, u + group < end ? u + group : end, s);
  }
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
  kernel_of(table, Strategy::tile_amx, Encoding::plain, DType::bf16) = {Panel::tiles_bf16, kUnitRows, 16, 16,
                                                                        scratch_bytes,     tile_amx};
  table.panel[static_cast<int>(Panel::tiles_bf16)][static_cast<int>(DType::bf16)] = pack_tiles_bf16;
}

}  // namespace sparseprune::amx
