// From the registers' sums to out, or to one split's part of them.
#pragma once

#include <cstring>

#include "cuda/linear/product.cuh"

namespace sparseprune::cuda {

// V sums of neighbouring rows, of all K groups, added up in the groups' order: the result does not depend on which warp was
// first. `part` counts eights of rows where V is 8.
template <typename C, int V>
SP_DEVICE void product_read_sums(simt::Shared<float> from, int part, float (&sum)[V]) {
  constexpr int kQuads = V == 1 ? 1 : V / 4, kWidth = V / kQuads;
  // Lanes 4 to 7 of each 8 read the second half of their 32 bytes first, or they would meet lanes 0 to 3 in their banks.
  const int swap = V == 8 ? part / 4 % 2 : 0;
  float quads[kQuads][kWidth] = {};
  SP_UNROLL
  for (int k = 0; k < C::kWarpsK; ++k) {
    SP_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      const auto at = from + (k * C::kPassRows * C::kPitch + (q ^ swap) * kWidth);
      float v[kWidth];
      if constexpr (V == 1) {
        v[0] = simt::load<float>(at);
      } else {
        const auto words = simt::load<simt::u32x4>(at);
        std::memcpy(v, &words, sizeof v);
      }
      SP_UNROLL
      for (int e = 0; e < kWidth; ++e) quads[q][e] += v[e];
    }
  }
  SP_UNROLL
  for (int e = 0; e < V; ++e) {
    const float straight = quads[e / kWidth][e % kWidth], crossed = quads[(e / kWidth) ^ (kQuads - 1)][e % kWidth];
    sum[e] = swap ? crossed : straight;
  }
}

// Out of a pass, V neighbouring rows a thread, so that a warp's accesses are one piece of memory; V > 1 where that is
// aligned.
template <typename T, typename C, int V, bool PARTIAL>
SP_DEVICE void product_write_pass(const ProductArgs& a, const ProductPlace& p, simt::Shared<float> tile, int pass) {
  constexpr int kParts = C::kTileM / V, kWarpRows = C::kPassTiles * 8;
  SP_ROLL
  for (int i = static_cast<int>(simt::thread_x()); i < C::kPassRows * kParts; i += C::kThreads) {
    const int local = i / kParts, part = i % kParts;
    const int n = (local / kWarpRows * C::kTilesN + pass * C::kPassTiles) * 8 + local % kWarpRows;
    const std::int64_t row = p.strip * kUnitRows + part * V, at = (p.n + n) * a.rows + row;
    if (n >= p.x_rows || row >= a.rows) continue;
    float sum[V];
    product_read_sums<C, V>(tile + (local * C::kPitch + part * V), part, sum);
    if constexpr (PARTIAL) {
      const auto to = a.partial + (static_cast<std::int64_t>(simt::block_y()) * a.batch * a.rows + at);
      if constexpr (V == 1) {
        simt::store(to, sum[0]);
      } else {
        simt::u32x4 words;
        std::memcpy(&words, sum, sizeof words);
        simt::store(to, words);
      }
    } else {
      T narrow[V];
      if (a.bias) {
        if constexpr (V == 1) {
          narrow[0].bits = simt::load<std::uint16_t>(a.bias + row);
        } else {
          const auto words = simt::load<simt::u32x4>(a.bias + row);
          std::memcpy(narrow, &words, sizeof words);
        }
        SP_UNROLL
        for (int e = 0; e < V; ++e) sum[e] += simt::to_float(narrow[e]);
      }
      SP_UNROLL
      for (int e = 0; e < V; ++e) narrow[e] = simt::from_float<T>(sum[e]);
      if constexpr (V == 1) {
        simt::store(a.out + at, narrow[0].bits);
      } else {
        simt::u32x4 words;
        std::memcpy(&words, narrow, sizeof words);
        simt::store(a.out + at, words);
      }
    }
  }
}

template <typename T, typename C>
SP_DEVICE void product_drain(const ProductArgs& a, const ProductPlace& p, const ProductSums<C>& acc) {
  const int lane = static_cast<int>(simt::lane());
  const auto tile = simt::shared_memory<float>(0);  // [k group][batch row of the pass][row]
  SP_UNROLL
  for (int pass = 0; pass < C::kPasses; ++pass) {
    simt::sync_block();  // the last stage, or the pass before, is read
    SP_UNROLL
    for (int j = 0; j < C::kPassTiles; ++j) {
      const int n = (p.warp_n * C::kPassTiles + j) * 8 + lane % 4 * 2;
      SP_UNROLL
      for (int u = 0; u < C::kUnits; ++u) {
        SP_UNROLL
        for (int h = 0; h < 2; ++h) {
          const auto& c = acc[u][h][pass * C::kPassTiles + j];
          const auto to = tile + ((p.k_group * C::kPassRows + n) * C::kPitch + (p.warp_m * C::kUnits + u) * kUnitRows +
                                  h * 16 + lane / 4);
          simt::store(to, c[0]);
          simt::store(to + C::kPitch, c[1]);
          simt::store(to + 8, c[2]);
          simt::store(to + (C::kPitch + 8), c[3]);
        }
      }
    }
    simt::sync_block();  // all sums of the pass are there
    if (a.partial && a.out_vectors) {
      product_write_pass<T, C, 4, true>(a, p, tile, pass);
    } else if (a.partial) {
      product_write_pass<T, C, 1, true>(a, p, tile, pass);
    } else if (a.out_vectors) {
      product_write_pass<T, C, 8, false>(a, p, tile, pass);
    } else {
      product_write_pass<T, C, 1, false>(a, p, tile, pass);
    }
  }
}

}  // namespace sparseprune::cuda
