// AVX-512 with BF16: bf16 tiles hold pairs of columns, and vdpbf16ps multiplies them unconverted.
#include "cpu/kernels.h"
#include "cpu/x86/avx512_bf16/expand.h"

namespace sparseprune::avx512_bf16 {
namespace {

// As tile_rows.inl, with k in steps of two: acc[b][lane] += w[lane][2p] x[b][2p] + w[lane][2p+1] x[b][2p+1].
// vdpbf16ps flushes subnormal inputs and results to zero.
template <int NB, int NT>
inline void dot_block(const LinearJob& job, std::int64_t tile, std::int64_t b0) {
  constexpr int kUnroll = NB * NT == 1 ? 4 : NB * NT <= 3 ? 2 : 1;
  const std::int64_t pairs = job.kpad / 2;
  const std::uint16_t* masks[NT];
  const bf16* values[NT];
  for (int t = 0; t < NT; ++t) {
    masks[t] = static_cast<const std::uint16_t*>(job.index) + (tile + t) * job.kpad;
    values[t] = static_cast<const bf16*>(job.values) + job.offsets[tile + t];
  }
  const auto* x = static_cast<const std::int32_t*>(job.panel) + b0 * pairs;

  __m512 acc[kUnroll][NT][NB];
  for (auto& part : acc) {
    for (auto& rows : part) {
      for (auto& a : rows) a = zero();
    }
  }
  for (std::int64_t p0 = 0; p0 < pairs; p0 += 4) {
    for (int t = 0; t < NT; ++t) {
      // Both lines of what 4 pairs read at 50 %; see tile_rows.inl.
      prefetch(reinterpret_cast<const char*>(values[t]) + kPrefetchBytes);
      prefetch(reinterpret_cast<const char*>(values[t]) + kPrefetchBytes + 64);
      if (p0 % 16 == 0) prefetch(reinterpret_cast<const char*>(masks[t] + 2 * p0) + kPrefetchBytes);
    }
#pragma GCC unroll 1
    for (std::int64_t p1 = p0; p1 < p0 + 4; p1 += kUnroll) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        const std::int64_t p = p1 + u;
        __m512bh w[NT];
#pragma GCC unroll 2
        for (int t = 0; t < NT; ++t) {
          const std::uint32_t mask = pair_mask(masks[t], p);
          w[t] = (__m512bh)expand_pairs(values[t], mask);
          values[t] += popcount(mask);
        }
#pragma GCC unroll 12
        for (int b = 0; b < NB; ++b) {
          const auto pair = (__m512bh)_mm512_set1_epi32(x[p * NB + b]);
#pragma GCC unroll 2
          for (int t = 0; t < NT; ++t) acc[u][t][b] = _mm512_dpbf16_ps(acc[u][t][b], w[t], pair);
        }
      }
    }
  }
  for (int t = 0; t < NT; ++t) {
    const std::int64_t row = (tile + t) * kTileRows;
    const int n = static_cast<int>(job.rows - row < kTileRows ? job.rows - row : kTileRows);
    const Vec bias = job.bias ? load_n(static_cast<const bf16*>(job.bias) + row, n) : zero();
    for (int b = 0; b < NB; ++b) {
      Vec sum = add(acc[0][t][b], bias);
      for (int u = 1; u < kUnroll; ++u) sum = add(sum, acc[u][t][b]);
      store_n(static_cast<bf16*>(job.out) + (b0 + b) * job.rows + row, sum, n);
    }
  }
}

template <int NB, int NT>
inline void dot_sized(const LinearJob& job, std::int64_t tile, std::int64_t b0, std::int64_t nb) {
  if (nb == NB) {
    dot_block<NB, NT>(job, tile, b0);
  } else if constexpr (NB > 1) {
    dot_sized<NB - 1, NT>(job, tile, b0, nb);
  }
}

// Units are pairs of tiles, as in tile_rows.inl.
void tile_rows_dot(const LinearJob& job, std::int64_t begin, std::int64_t end, void*) {
  const std::int64_t tiles = ceil_div(job.rows, kTileRows), last = 2 * end < tiles ? 2 * end : tiles;
  std::int64_t tile = 2 * begin;
  if (job.block <= kPairBatch) {
    for (; tile + 2 <= last; tile += 2) {
      for (std::int64_t b = 0; b < job.batch; b += job.block) {
        dot_sized<kPairBatch, 2>(job, tile, b, job.block < job.batch - b ? job.block : job.batch - b);
      }
    }
  }
  for (; tile < last; ++tile) {
    for (std::int64_t b = 0; b < job.batch; b += job.block) {
      dot_sized<kMaxBatch, 1>(job, tile, b, job.block < job.batch - b ? job.block : job.batch - b);
    }
  }
}

void pack_pairs_bf16(const PanelJob& job, std::int64_t begin, std::int64_t end) {
  for (std::int64_t b0 = 0; b0 < job.batch; b0 += job.block) {
    const std::int64_t width = job.batch - b0 < job.block ? job.batch - b0 : job.block;
    auto* block = static_cast<bf16*>(job.panel) + b0 * job.kpad;
    for (std::int64_t b = 0; b < width; ++b) {
      const bf16* x = static_cast<const bf16*>(job.x) + (b0 + b) * job.stride;
      for (std::int64_t k = begin * 16; k < end * 16; k += 2) {
        bf16* out = block + (k / 2 * width + b) * 2;
        out[0] = k < job.cols ? x[k] : bf16{};
        out[1] = k + 1 < job.cols ? x[k + 1] : bf16{};
      }
    }
  }
}

std::size_t no_scratch(const LinearJob&) {
  return 0;
}

}  // namespace

void install(KernelTable& table) {
  table.isa = "avx512_bf16";
  table.bf16_interleave = 2;
  const auto at = [&](Strategy s) -> LinearKernel& { return kernel_of(table, s, Encoding::plain, DType::bf16); };
  at(Strategy::tile_rows) = {Panel::pairs_bf16, 2 * kTileRows, kMaxBatch, 1, no_scratch, tile_rows_dot};
  // These read single columns, not pairs.
  at(Strategy::tile_dense).run = nullptr;
  at(Strategy::tile_batch).run = nullptr;
  table.panel[static_cast<int>(Panel::pairs_bf16)][static_cast<int>(DType::bf16)] = pack_pairs_bf16;
}

}  // namespace sparseprune::avx512_bf16
