// Linear over `tile` weights for many batch rows, lanes are output rows: weights are expanded once, then it is a dense
// product at the speed of FMA. What sparsity saves here is memory and the packing of weights, not operations.
//
//   acc[t][b][lane] += w[tile t][lane][k] * x[b][k]
//
// Panel: blocks_f32 of at most kDenseBatch rows.
// Work partition: groups of tiles x chunks of K. A chunk's panel (kDenseChunk x batch x 4 bytes) stays in L2 while the
// group's tiles pass over it; kDenseTiles tiles are expanded to L1 and meet every block of batch rows, whose sums stay
// in registers (kDenseTiles x kDenseBatch vectors) within the chunk and wait in scratch between chunks.

constexpr std::int64_t kDenseChunk = 256;
constexpr std::int64_t kDenseGroupBytes = 1 << 19;  // sums of a group
constexpr std::int64_t kDenseMaxGroup = 32;         // tiles

struct TileDenseScratch {
  alignas(64) float weights[kDenseChunk][kDenseTiles][kTileRows];
  // then float sums[group tiles / kDenseTiles][batch][kDenseTiles][16]
};

inline std::int64_t tile_dense_group(const LinearJob& job) {
  const std::int64_t fits = kDenseGroupBytes / (job.batch * kTileRows * 4);
  const std::int64_t tiles = fits < kDenseTiles ? kDenseTiles : fits < kDenseMaxGroup ? fits : kDenseMaxGroup;
  return tiles / kDenseTiles * kDenseTiles;
}

inline std::size_t tile_dense_scratch(const LinearJob& job) {
  return sizeof(TileDenseScratch) + static_cast<std::size_t>(tile_dense_group(job) * job.batch * kTileRows) * sizeof(float);
}

template <int NB>
inline void dense_block(const float (*weights)[kDenseTiles][kTileRows], std::int64_t size, const float* x, float* sums,
                        bool first, const char* ahead, std::int64_t lines) {
  Vec acc[kDenseTiles][NB];
#pragma GCC unroll 12
  for (int b = 0; b < NB; ++b) {
#pragma GCC unroll 2
    for (int t = 0; t < kDenseTiles; ++t) acc[t][b] = first ? zero() : load(sums + (b * kDenseTiles + t) * kTileRows);
  }
  for (std::int64_t k = 0; k < size; ++k) {
    if (k < lines) prefetch(ahead + 64 * k);
    Vec w[kDenseTiles];
#pragma GCC unroll 2
    for (int t = 0; t < kDenseTiles; ++t) w[t] = load(weights[k][t]);
#pragma GCC unroll 12
    for (int b = 0; b < NB; ++b) {
      const auto scale = broadcast(x[k * NB + b]);
#pragma GCC unroll 2
      for (int t = 0; t < kDenseTiles; ++t) acc[t][b] = fma(w[t], scale, acc[t][b]);
    }
  }
#pragma GCC unroll 12
  for (int b = 0; b < NB; ++b) {
#pragma GCC unroll 2
    for (int t = 0; t < kDenseTiles; ++t) store(sums + (b * kDenseTiles + t) * kTileRows, acc[t][b]);
  }
}

template <int NB>
inline void dense_sized(const float (*weights)[kDenseTiles][kTileRows], std::int64_t size, const float* x, float* sums,
                        bool first, const char* ahead, std::int64_t lines, std::int64_t nb) {
  if (nb == NB) {
    dense_block<NB>(weights, size, x, sums, first, ahead, lines);
  } else if constexpr (NB > 1) {
    dense_sized<NB - 1>(weights, size, x, sums, first, ahead, lines, nb);
  }
}

template <typename T>
void tile_dense_group_run(const LinearJob& job, std::int64_t begin, std::int64_t end, TileDenseScratch& s) {
  float* sums = reinterpret_cast<float*>(&s + 1);
  const T* values[kDenseMaxGroup];
  for (std::int64_t t = begin; t < end; ++t) values[t - begin] = static_cast<const T*>(job.values) + job.offsets[t];
  const std::int64_t sums_stride = job.batch * kDenseTiles * kTileRows;

  for (std::int64_t k0 = 0; k0 < job.kpad; k0 += kDenseChunk) {
    const std::int64_t size = job.kpad - k0 < kDenseChunk ? job.kpad - k0 : kDenseChunk;
    for (std::int64_t tile = begin; tile < end; tile += kDenseTiles) {
      for (int t = 0; t < kDenseTiles; ++t) {
        if (tile + t >= end) {
          for (std::int64_t k = 0; k < size; ++k) store(s.weights[k][t], zero());
          continue;
        }
        const auto* masks = static_cast<const std::uint16_t*>(job.index) + (tile + t) * job.kpad + k0;
        const T*& next = values[tile + t - begin];
        for (std::int64_t k = 0; k < size; ++k) {
          if (k % 4 == 0) prefetch_ahead(next);
          const std::uint32_t mask = masks[k];
          store(s.weights[k][t], expand(next, mask));
          next += popcount(mask);
        }
      }
      // Products leave memory idle: block i fetches what tile i of the next step expands.
      const std::int64_t next_tile = tile + kDenseTiles < end ? tile + kDenseTiles : begin;
      int ahead_tile = 0;
      for (std::int64_t b = 0; b < job.batch; b += job.block) {
        const bool fetch = ahead_tile < kDenseTiles && next_tile + ahead_tile < end;
        const std::int64_t from = fetch ? next_tile + ahead_tile : begin;
        const std::int64_t kept = job.offsets[from + 1] - job.offsets[from];
        const std::int64_t lines = fetch ? kept * size * static_cast<std::int64_t>(sizeof(T)) / job.kpad / 64 + 1 : 0;
        ++ahead_tile;
        const std::int64_t nb = job.batch - b < job.block ? job.batch - b : job.block;
        const float* x = static_cast<const float*>(job.panel) + b * job.kpad + k0 * nb;
        float* out = sums + (tile - begin) / kDenseTiles * sums_stride + b * kDenseTiles * kTileRows;
        dense_sized<kDenseBatch>(s.weights, size, x, out, k0 == 0, reinterpret_cast<const char*>(values[from - begin]),
                                 lines, nb);
      }
    }
  }

  for (std::int64_t tile = begin; tile < end; ++tile) {
    const std::int64_t row = tile * kTileRows;
    const int n = static_cast<int>(job.rows - row < kTileRows ? job.rows - row : kTileRows);
    const Vec bias = job.bias ? load_n(static_cast<const T*>(job.bias) + row, n) : zero();
    const std::int64_t local = tile - begin;
    const float* own = sums + local / kDenseTiles * sums_stride + local % kDenseTiles * kTileRows;
    for (std::int64_t b = 0; b < job.batch; ++b) {
      store_n(static_cast<T*>(job.out) + b * job.rows + row, add(load(own + b * kDenseTiles * kTileRows), bias), n);
    }
  }
}

template <typename T>
void tile_dense(const LinearJob& job, std::int64_t begin, std::int64_t end, void* scratch) {
  const std::int64_t group = tile_dense_group(job);
  for (std::int64_t t = begin; t < end; t += group) {
    tile_dense_group_run<T>(job, t, t + group < end ? t + group : end, *static_cast<TileDenseScratch*>(scratch));
  }
}
