// Linear over `tile` weights, lanes are output rows.
//
//   acc[b][lane] += w[row0 + lane][k] * x[b][k]     for the 16 rows of a tile, k ascending
//
// Weights: masks [kpad] of the tile (bit r: row r keeps column k), values in the same order (k-major, lanes within).
// Panel:   rows_f32, float [batch][kpad].
// A weight vector is expanded once for NB batch rows; activations are broadcast from memory. There is no horizontal
// sum, and the weights are read once, front to back, so small batches run at the speed of memory.
// kUnroll keeps enough independent sums to cover the latency of FMA when NB alone does not.

template <typename T, int NB>
inline void tile_rows_block(const LinearJob& job, std::int64_t tile, std::int64_t b0) {
  constexpr int kUnroll = NB == 1 ? 4 : NB <= 3 ? 2 : 1;
  const auto* masks = static_cast<const std::uint16_t*>(job.index) + tile * job.kpad;
  const T* values = static_cast<const T*>(job.values) + job.offsets[tile];
  const float* x = static_cast<const float*>(job.panel) + b0 * job.kpad;
  const std::int64_t kpad = job.kpad;

  Vec acc[kUnroll][NB];
  for (auto& part : acc) {
    for (auto& a : part) a = zero();
  }
  for (std::int64_t k = 0; k < kpad; k += 4) {
    prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes);
    if (k % 32 == 0) prefetch(reinterpret_cast<const char*>(masks + k) + kPrefetchBytes);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const std::uint32_t mask = masks[k + u];
      const Vec w = expand(values, mask);
      values += popcount(mask);
#pragma GCC unroll 24
      for (int b = 0; b < NB; ++b) {
        acc[u % kUnroll][b] = fma(w, broadcast(x[b * kpad + k + u]), acc[u % kUnroll][b]);
      }
    }
  }
  const std::int64_t row = tile * kTileRows;
  const int n = static_cast<int>(job.rows - row < kTileRows ? job.rows - row : kTileRows);
  const Vec bias = job.bias ? load_n(static_cast<const T*>(job.bias) + row, n) : zero();
  for (int b = 0; b < NB; ++b) {
    Vec sum = add(acc[0][b], bias);
    for (int u = 1; u < kUnroll; ++u) sum = add(sum, acc[u][b]);
    store_n(static_cast<T*>(job.out) + (b0 + b) * job.rows + row, sum, n);
  }
}

template <typename T, int NB>
inline void tile_rows_sized(const LinearJob& job, std::int64_t tile, std::int64_t b0, std::int64_t nb) {
  if (nb == NB) {
    tile_rows_block<T, NB>(job, tile, b0);
  } else if constexpr (NB > 1) {
    tile_rows_sized<T, NB - 1>(job, tile, b0, nb);
  }
}

template <typename T>
void tile_rows(const LinearJob& job, std::int64_t begin, std::int64_t end, void*) {
  // Blocks of equal size, so that the last one does not expand the weights for a few rows only.
  const std::int64_t blocks = ceil_div(job.batch, kMaxBatch);
  const std::int64_t size = ceil_div(job.batch, blocks);
  for (std::int64_t tile = begin; tile < end; ++tile) {
    for (std::int64_t b = 0; b < job.batch; b += size) {
      tile_rows_sized<T, kMaxBatch>(job, tile, b, size < job.batch - b ? size : job.batch - b);
    }
  }
}
