// AVX-512 with VBMI2, VNNI and BF16: bf16 tiles hold pairs of columns, and vdpbf16ps multiplies them unconverted.
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
      prefetch(reinterpret_cast<const char*>(values[t]) + kPrefetchBytes);
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

// 16-bit words, 32 at a time.
inline __mmask32 first32(std::int64_t n) {
  return n >= 32 ? ~0u : (1u << n) - 1u;
}
inline std::uint32_t load_bits(const std::uint8_t* bits, std::int64_t n) {
  std::uint32_t m = 0;
  std::memcpy(&m, bits, static_cast<std::size_t>(n >= 32 ? 4 : ceil_div(n, 8)));
  return m;
}
void compress16(const void* in, const std::uint8_t* bits, void* out, std::int64_t n) {
  const auto* x = static_cast<const std::uint16_t*>(in);
  auto* y = static_cast<std::uint16_t*>(out);
  for (std::int64_t i = 0; i < n; i += 32) {
    const std::uint32_t m = load_bits(bits + i / 8, n - i);
    const int kept = popcount(m);
    const __m512i packed = _mm512_maskz_compress_epi16(m, _mm512_maskz_loadu_epi16(first32(n - i), x + i));
    _mm512_mask_storeu_epi16(y, first32(kept), packed);  // exactly the kept words: the next row is another thread's
    y += kept;
  }
}
void expand16(const void* values, const std::uint8_t* bits, void* out, std::int64_t n) {
  const auto* x = static_cast<const std::uint16_t*>(values);
  auto* y = static_cast<std::uint16_t*>(out);
  for (std::int64_t i = 0; i < n; i += 32) {
    const std::uint32_t m = load_bits(bits + i / 8, n - i);
    const int kept = popcount(m);
    const __m512i packed = _mm512_maskz_loadu_epi16(first32(kept), x);
    _mm512_mask_storeu_epi16(y + i, first32(n - i), _mm512_maskz_expand_epi16(m, packed));
    x += kept;
  }
}
void csr_row16(const void* in, std::int32_t* cols, void* values, std::int64_t n) {
  const auto* x = static_cast<const std::uint16_t*>(in);
  auto* y = static_cast<std::uint16_t*>(values);
  __m512i column = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (std::int64_t i = 0; i < n; i += 32) {
    const __m512i words = _mm512_maskz_loadu_epi16(first32(n - i), x + i);
    const __mmask32 m = _mm512_test_epi16_mask(words, _mm512_set1_epi16(0x7fff));
    const int kept = popcount(m), low = popcount(m & 0xffffu);
    _mm512_mask_storeu_epi16(y, first32(kept), _mm512_maskz_compress_epi16(m, words));
    _mm512_mask_storeu_epi32(cols, first(low), _mm512_maskz_compress_epi32(m & 0xffffu, column));
    column = _mm512_add_epi32(column, _mm512_set1_epi32(16));
    _mm512_mask_storeu_epi32(cols + low, first(kept - low), _mm512_maskz_compress_epi32(m >> 16, column));
    column = _mm512_add_epi32(column, _mm512_set1_epi32(16));
    y += kept;
    cols += kept;
  }
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
  table.words16.compress = compress16;
  table.words16.expand = expand16;
  table.words16.csr_row = csr_row16;
}

}  // namespace sparseprune::avx512_bf16
