// Linear over `tile` weights, lanes are batch rows: a pruned weight costs nothing.
//
//   acc[row][lanes] += w[row][k] * x[lanes][k]     for the kept k of a row only
//
// Panel: blocks_f32 of width 16 * NV.
// Work partition: a tile's 16 rows x one block. K goes in chunks of kChunk columns, whose panel rows (kChunk x
// width x 4 bytes) stay in L1 while the 16 rows pass over them. Per chunk, the tile is expanded to floats [kChunk][16]
// and its masks are transposed to one word per row and 32 columns; the set bits of that word drive the inner loop.
// One weight costs NV fused multiply-adds and NV + 1 loads.

constexpr std::int64_t kChunk = 64;

struct TileBatchScratch {
  alignas(64) float weights[kChunk][kTileRows];
  alignas(64) float acc[kTileRows][16 * kMaxLanes];
  std::uint32_t kept[kChunk / 32][kTileRows];
};

inline std::size_t tile_batch_scratch(const LinearJob&) {
  return sizeof(TileBatchScratch);
}

template <typename T, int NV>
inline void tile_batch_block(const LinearJob& job, std::int64_t tile, std::int64_t b0, const float* panel,
                             TileBatchScratch& s) {
  constexpr std::int64_t width = 16 * NV;
  const auto* masks = static_cast<const std::uint16_t*>(job.index) + tile * job.kpad;
  const T* values = static_cast<const T*>(job.values) + job.offsets[tile];

  for (std::int64_t k0 = 0; k0 < job.kpad; k0 += kChunk) {
    const std::int64_t size = job.kpad - k0 < kChunk ? job.kpad - k0 : kChunk;  // 32 or 64
    for (std::int64_t k = 0; k < size; ++k) {
      const std::uint32_t mask = masks[k0 + k];
      store(s.weights[k], expand(values, mask));
      values += popcount(mask);
    }
    const int words = static_cast<int>(size / 32);
    for (int w = 0; w < words; ++w) transpose_masks(masks + k0 + 32 * w, s.kept[w]);

    for (int r = 0; r < kTileRows; ++r) {
      Vec acc[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[v] = k0 == 0 ? zero() : load(s.acc[r] + 16 * v);
      for (int w = 0; w < words; ++w) {
        const float* x = panel + (k0 + 32 * w) * width;
        const float* weight = s.weights[32 * w] + r;
        for (std::uint32_t bits = s.kept[w][r]; bits != 0; bits &= bits - 1) {
          const int k = __builtin_ctz(bits);
          const auto scale = broadcast(weight[k * kTileRows]);
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) acc[v] = fma(load(x + k * width + 16 * v), scale, acc[v]);
        }
      }
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) store(s.acc[r] + 16 * v, acc[v]);
    }
  }

  const std::int64_t row = tile * kTileRows;
  const int n = static_cast<int>(job.rows - row < kTileRows ? job.rows - row : kTileRows);
  const Vec bias = job.bias ? load_n(static_cast<const T*>(job.bias) + row, n) : zero();
  for (std::int64_t b = b0; b < job.batch && b < b0 + width; ++b) {
    float column[kTileRows];
    for (int r = 0; r < kTileRows; ++r) column[r] = s.acc[r][b - b0];
    store_n(static_cast<T*>(job.out) + b * job.rows + row, add(load(column), bias), n);
  }
}

template <typename T, int NV>
inline void tile_batch_sized(const LinearJob& job, std::int64_t tile, std::int64_t b0, const float* panel,
                             std::int64_t lanes, TileBatchScratch& s) {
  if (lanes == NV) {
    tile_batch_block<T, NV>(job, tile, b0, panel, s);
  } else if constexpr (NV > 1) {
    tile_batch_sized<T, NV - 1>(job, tile, b0, panel, lanes, s);
  }
}

template <typename T>
void tile_batch(const LinearJob& job, std::int64_t begin, std::int64_t end, void* scratch) {
  auto& s = *static_cast<TileBatchScratch*>(scratch);
  for (std::int64_t b = 0; b < job.batch; b += job.block) {
    const std::int64_t rows = job.batch - b < job.block ? job.batch - b : job.block;
    const float* panel = static_cast<const float*>(job.panel) + b * job.kpad;
    for (std::int64_t tile = begin; tile < end; ++tile) {
      tile_batch_sized<T, kMaxLanes>(job, tile, b, panel, ceil_div(rows, 16), s);
    }
  }
}
