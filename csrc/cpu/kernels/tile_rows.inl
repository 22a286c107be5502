// Linear over `tile` weights, lanes are output rows.
//
//   acc[b][lane] += w[row0 + lane][k] * x[b][k]     for the 16 rows of a tile, k ascending
//
// Weights: masks [kpad] of the tile (bit r: row r keeps column k), values in the same order (k-major, lanes within).
// Panel:   blocks_f32, [kpad][NB]: the activations that meet a weight vector lie side by side.
// A weight vector is expanded once for NB batch rows; activations are broadcast from memory. There is no horizontal
// sum, and the weights are read once, front to back, so small batches run at the speed of memory.
// kUnroll keeps enough independent sums to cover the latency of FMA when NB alone does not; for few batch rows two
// tiles are walked together (NT = 2), because four streams draw more from memory than two.

// Every line of what 4 columns read at 50 % zeros. 2:4 advances by whole lines, so that with one of two asked for, the other is
// always waited for: on Zen 5 such a weight ran at 40 % of the memory's speed, and one with zeros at random at all of it.
template <typename T>
inline void prefetch_ahead(const T* values) {
  prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes);
  if (sizeof(T) == 4) prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes + 64);
}

template <typename T, int NB, int NT>
inline void tile_rows_block(const LinearJob& job, std::int64_t tile, std::int64_t b0) {
  constexpr int kUnroll = NB * NT == 1 ? 4 : NB * NT <= 3 ? 2 : 1;
  const std::int64_t kpad = job.kpad;
  const std::uint16_t* masks[NT];
  const T* values[NT];
  for (int t = 0; t < NT; ++t) {
    masks[t] = static_cast<const std::uint16_t*>(job.index) + (tile + t) * kpad;
    values[t] = static_cast<const T*>(job.values) + job.offsets[tile + t];
  }
  const float* x = static_cast<const float*>(job.panel) + b0 * kpad;

  Vec acc[kUnroll][NT][NB];
  for (auto& part : acc) {
    for (auto& rows : part) {
      for (auto& a : rows) a = zero();
    }
  }
  for (std::int64_t k0 = 0; k0 < kpad; k0 += 4) {
    for (int t = 0; t < NT; ++t) {
      prefetch_ahead(values[t]);
      if (k0 % 32 == 0) prefetch(reinterpret_cast<const char*>(masks[t] + k0) + kPrefetchBytes);
    }
#pragma GCC unroll 1
    for (std::int64_t k1 = k0; k1 < k0 + 4; k1 += kUnroll) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        const std::int64_t k = k1 + u;
        Vec w[NT];
#pragma GCC unroll 2
        for (int t = 0; t < NT; ++t) {
          const std::uint32_t mask = masks[t][k];
          w[t] = expand(values[t], mask);
          values[t] += popcount(mask);
        }
#pragma GCC unroll 12
        for (int b = 0; b < NB; ++b) {
          const auto scale = broadcast(x[k * NB + b]);
#pragma GCC unroll 2
          for (int t = 0; t < NT; ++t) acc[u][t][b] = fma(w[t], scale, acc[u][t][b]);
        }
      }
    }
  }
  for (int t = 0; t < NT; ++t) {
    const std::int64_t row = (tile + t) * kTileRows;
    const int n = static_cast<int>(job.rows - row < kTileRows ? job.rows - row : kTileRows);
    const Vec bias = job.bias ? load_n(static_cast<const T*>(job.bias) + row, n) : zero();
    for (int b = 0; b < NB; ++b) {
      Vec sum = add(acc[0][t][b], bias);
      for (int u = 1; u < kUnroll; ++u) sum = add(sum, acc[u][t][b]);
      store_n(static_cast<T*>(job.out) + (b0 + b) * job.rows + row, sum, n);
    }
  }
}

template <typename T, int NB, int NT>
inline void tile_rows_sized(const LinearJob& job, std::int64_t tile, std::int64_t b0, std::int64_t nb) {
  if (nb == NB) {
    tile_rows_block<T, NB, NT>(job, tile, b0);
  } else if constexpr (NB > 1) {
    tile_rows_sized<T, NB - 1, NT>(job, tile, b0, nb);
  }
}

// Units are pairs of tiles, so that which tiles are walked together, and with it the order of sums, does not depend on
// how the work was divided.
template <typename T>
void tile_rows(const LinearJob& job, std::int64_t begin, std::int64_t end, void*) {
  const std::int64_t tiles = ceil_div(job.rows, kTileRows), last = 2 * end < tiles ? 2 * end : tiles;
  std::int64_t tile = 2 * begin;
  if (job.block <= kPairBatch) {
    for (; tile + 2 <= last; tile += 2) {
      for (std::int64_t b = 0; b < job.batch; b += job.block) {
        tile_rows_sized<T, kPairBatch, 2>(job, tile, b, job.block < job.batch - b ? job.block : job.batch - b);
      }
    }
  }
  for (; tile < last; ++tile) {
    for (std::int64_t b = 0; b < job.batch; b += job.block) {
      tile_rows_sized<T, kMaxBatch, 1>(job, tile, b, job.block < job.batch - b ? job.block : job.batch - b);
    }
  }
}
