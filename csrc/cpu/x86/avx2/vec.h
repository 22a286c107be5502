// 16 floats as two 256-bit registers. No expand instruction here: a table of permutations stands in for it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace sparseprune::avx2 {
namespace {

struct Vec {
  __m256 lo, hi;
};

constexpr int kMaxBatch = 6;   // 12 sums, 2 weights, 1 broadcast: 15 of 16 registers
constexpr int kPairBatch = 2;  // 8 sums of two tiles
constexpr int kMaxLanes = 4;   // 8 accumulators
constexpr int kDenseTiles = 1;
constexpr int kDenseBatch = 6;

// permutation[m][i]: which packed value lane i takes when m's bits say which lanes are kept; with the bit set that makes a 0 of
// it in a shuffle of bytes, where it takes none.
struct ExpandTable {
  alignas(32) std::uint8_t permutation[256][8];
};
constexpr ExpandTable make_expand_table() {
  ExpandTable t{};
  for (int m = 0; m < 256; ++m) {
    int next = 0;
    for (int i = 0; i < 8; ++i) t.permutation[m][i] = static_cast<std::uint8_t>(m >> i & 1 ? next++ : 0x80);
  }
  return t;
}
constexpr ExpandTable kExpand = make_expand_table();

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
  return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}
inline __m256 broadcast(float x) {
  return _mm256_set1_ps(x);
}
inline Vec load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
inline void store(float* p, const Vec& a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline Vec fma(const Vec& a, __m256 b, const Vec& c) {
  return {_mm256_fmadd_ps(a.lo, b, c.lo), _mm256_fmadd_ps(a.hi, b, c.hi)};
}
inline Vec add(const Vec& a, const Vec& b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}

inline __m256 load8(const float* p) {
  return _mm256_loadu_ps(p);
}
inline __m256 load8(const bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline __m256 load8(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store8(float* p, __m256 a) {
  _mm256_storeu_ps(p, a);
}
inline void store8(bf16* p, __m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store8(f16* p, __m256 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
template <typename T>
inline Vec load_n(const T* p, int n) {
  if (n >= 16) return {load8(p), load8(p + 8)};
  T part[16] = {};
  std::memcpy(part, p, static_cast<std::size_t>(n) * sizeof(T));
  return {load8(part), load8(part + 8)};
}
template <typename T>
inline void store_n(T* p, const Vec& a, int n) {
  if (n >= 16) {
    store8(p, a.lo);
    store8(p + 8, a.hi);
    return;
  }
  T part[16];
  store8(part, a.lo);
  store8(part + 8, a.hi);
  std::memcpy(p, part, static_cast<std::size_t>(n) * sizeof(T));
}

inline __m256 expand8(__m256 packed, std::uint32_t mask) {
  const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.permutation[mask])));
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
  return _mm256_and_ps(_mm256_permutevar8x32_ps(packed, order), _mm256_castsi256_ps(kept));
}
template <typename T>
inline Vec expand(const T* values, std::uint32_t mask) {
  const std::uint32_t low = mask & 255u;
  return {expand8(load8(values), low), expand8(load8(values + popcount(low)), mask >> 8)};
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
inline void from_float(float x, float* out) {
  *out = x;
}
inline void from_float(float x, bf16* out) {
  bf16 part[8];
  store8(part, _mm256_set1_ps(x));
  *out = part[0];
}
inline void from_float(float x, f16* out) {
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}

inline float sum(__m256 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline __m256i load_columns8(const std::uint16_t* c) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(c)));
}
inline __m256i load_columns8(const std::int32_t* c) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c));
}
template <typename T, typename C>
inline float gather_dot(const T* values, const C* columns, std::int64_t n, const float* x) {
  __m256 acc0 = _mm256_setzero_ps(), acc1 = acc0;
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    acc0 = _mm256_fmadd_ps(load8(values + i), _mm256_i32gather_ps(x, load_columns8(columns + i), 4), acc0);
    acc1 = _mm256_fmadd_ps(load8(values + i + 8), _mm256_i32gather_ps(x, load_columns8(columns + i + 8), 4), acc1);
  }
  float total = sum(_mm256_add_ps(acc0, acc1));
  for (; i < n; ++i) total += to_float(values[i]) * x[columns[i]];
  return total;
}
inline void transpose_masks(const std::uint16_t* masks, std::uint32_t* rows) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(masks));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(masks + 16));
  // Bytes of rows 0-7 and of rows 8-15, in the order of k; movemask then reads one row's bit of all 32 at a time.
  const __m256i byte = _mm256_set1_epi16(255);
  __m256i low = _mm256_permute4x64_epi64(_mm256_packus_epi16(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte)), 0xd8);
  __m256i high = _mm256_permute4x64_epi64(_mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)), 0xd8);
  for (int r = 7; r >= 0; --r) {
    rows[r] = static_cast<std::uint32_t>(_mm256_movemask_epi8(low));
    rows[r + 8] = static_cast<std::uint32_t>(_mm256_movemask_epi8(high));
    low = _mm256_add_epi8(low, low);
    high = _mm256_add_epi8(high, high);
  }
}

}  // namespace
}  // namespace sparseprune::avx2
