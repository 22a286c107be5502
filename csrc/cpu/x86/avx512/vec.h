// 16 floats as one 512-bit register (AVX-512 F, BW, DQ, VL). 16-bit values are widened before they are expanded.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace sparseprune::avx512 {
namespace {

using Vec = __m512;

constexpr int kMaxBatch = 12;   // 24 sums of two tiles, of 32 registers
constexpr int kPairBatch = 12;  // always two tiles: a broadcast serves both
constexpr int kMaxLanes = 8;
constexpr int kDenseTiles = 2;
constexpr int kDenseBatch = 12;

constexpr std::int64_t kPrefetchBytes = 1024;

inline void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
inline int popcount(std::uint32_t bits) {
  // GCC would count a 16-bit mask with the 16-bit popcnt, whose partial result chains each step to the one before.
  __asm__("" : "+r"(bits));
  return __builtin_popcount(bits);
}
inline Vec zero() {
  return _mm512_setzero_ps();
}
inline __m512 broadcast(float x) {
  return _mm512_set1_ps(x);
}
inline Vec load(const float* p) {
  return _mm512_loadu_ps(p);
}
inline void store(float* p, Vec a) {
  _mm512_storeu_ps(p, a);
}
inline Vec fma(Vec a, __m512 b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Vec add(Vec a, Vec b) {
  return _mm512_add_ps(a, b);
}
inline __mmask16 first(int n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u);
}

inline Vec widen(__m256i raw, const bf16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline Vec widen(__m256i raw, const f16*) {
  return _mm512_cvtph_ps(raw);
}
inline __m256i narrow(Vec a, const bf16*) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), high, _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(rounded);
}
inline __m256i narrow(Vec a, const f16*) {
  return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT);
}

inline Vec load_n(const float* p, int n) {
  return _mm512_maskz_loadu_ps(first(n), p);
}
template <typename T>
inline Vec load_n(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), p), p);
}
inline void store_n(float* p, Vec a, int n) {
  _mm512_mask_storeu_ps(p, first(n), a);
}
template <typename T>
inline void store_n(T* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(a, p));
}

inline Vec expand(const float* values, std::uint32_t mask) {
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), _mm512_loadu_ps(values));
}
inline Vec expand(const bf16* values, std::uint32_t mask) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), wide), 16));
}
inline Vec expand(const f16* values, std::uint32_t mask) {
  const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), wide);
}

inline float to_float(float x) {
  return x;
}
inline float to_float(bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(f16 x) {
  return _cvtsh_ss(x.bits);
}
template <typename T>
inline void from_float(float x, T* out) {
  store_n(out, _mm512_set1_ps(x), 1);
}

inline __m512i load_columns(const std::uint16_t* c, __mmask16 m) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, c));
}
inline __m512i load_columns(const std::int32_t* c, __mmask16 m) {
  return _mm512_maskz_loadu_epi32(m, c);
}
template <typename T, typename C>
inline float gather_dot(const T* values, const C* columns, std::int64_t n, const float* x) {
  __m512 acc[2] = {zero(), zero()};
  std::int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    prefetch(reinterpret_cast<const char*>(values + i) + kPrefetchBytes);
    prefetch(reinterpret_cast<const char*>(columns + i) + kPrefetchBytes);
    if (sizeof(T) == 4) prefetch(reinterpret_cast<const char*>(values + i) + kPrefetchBytes + 64);
    for (int u = 0; u < 2; ++u) {
      const __m512i c = load_columns(columns + i + 16 * u, 0xffff);
      acc[u] = _mm512_fmadd_ps(load_n(values + i + 16 * u, 16), _mm512_i32gather_ps(c, x, 4), acc[u]);
    }
  }
  for (; i < n; i += 16) {
    const int left = static_cast<int>(n - i);
    const __mmask16 m = first(left);
    const __m512 picked = _mm512_mask_i32gather_ps(zero(), m, load_columns(columns + i, m), x, 4);
    acc[0] = _mm512_fmadd_ps(load_n(values + i, left), picked, acc[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(acc[0], acc[1]));
}
inline void transpose_masks(const std::uint16_t* masks, std::uint32_t* rows) {
  const __m512i all = _mm512_loadu_si512(masks);
  for (int r = 0; r < 16; ++r) {
    rows[r] = _mm512_test_epi16_mask(all, _mm512_set1_epi16(static_cast<short>(1u << r)));
  }
}

}  // namespace
}  // namespace sparseprune::avx512
