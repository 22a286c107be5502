// 16 floats in plain C++: the meaning of every Vec operation, and the level that runs on any CPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace sparseprune::scalar {
namespace {

struct Vec {
  float v[16];
};

constexpr int kMaxBatch = 4;   // batch rows whose sums a kernel keeps
constexpr int kPairBatch = 1;  // the same where it walks two tiles at once
constexpr int kMaxLanes = 4;   // vectors of batch lanes a kernel keeps
constexpr int kDenseTiles = 1;
constexpr int kDenseBatch = 4;

inline float bits_to_float(std::uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline std::uint32_t float_to_bits(float f) {
  std::uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float to_float(float x) {
  return x;
}
inline float to_float(bf16 x) {
  return bits_to_float(static_cast<std::uint32_t>(x.bits) << 16);
}
inline float to_float(f16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (x.bits >> 10) & 31u;
  const std::uint32_t mantissa = x.bits & 1023u;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bits_to_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal or zero: exact
  return bits_to_float(sign | float_to_bits(magnitude));
}

// Round to nearest, ties to even; NaN stays NaN.
inline void from_float(float x, float* out) {
  *out = x;
}
inline void from_float(float x, bf16* out) {
  const std::uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  } else {
    out->bits = static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}
inline void from_float(float x, f16* out) {
  const std::uint32_t bits = float_to_bits(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or is infinite
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the subnormal's last bit with the float's
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(sign | half);
}

constexpr std::int64_t kPrefetchBytes = 1024;

inline void prefetch(const void* p) {
  __builtin_prefetch(p);
}
inline int popcount(std::uint32_t bits) {
  return __builtin_popcount(bits);
}
inline Vec zero() {
  return Vec{};
}
inline float broadcast(float x) {
  return x;
}
inline Vec load(const float* p) {
  Vec r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store(float* p, const Vec& a) {
  std::memcpy(p, a.v, sizeof a.v);
}
inline Vec fma(const Vec& a, float b, const Vec& c) {
  Vec r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] * b + c.v[i];
  return r;
}
inline Vec add(const Vec& a, const Vec& b) {
  Vec r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] + b.v[i];
  return r;
}
// Lanes from n on are zero, and not read.
template <typename T>
inline Vec load_n(const T* p, int n) {
  Vec r{};
  for (int i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
  return r;
}
template <typename T>
inline void store_n(T* p, const Vec& a, int n) {
  for (int i = 0; i < n; ++i) from_float(a.v[i], p + i);
}
// Lane i takes the next value where bit i of mask is set, else zero.
template <typename T>
inline Vec expand(const T* values, std::uint32_t mask) {
  Vec r{};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1u) r.v[i] = to_float(*values++);
  }
  return r;
}
// sum_i values[i] * x[columns[i]]
template <typename T, typename C>
inline float gather_dot(const T* values, const C* columns, std::int64_t n, const float* x) {
  float sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += to_float(values[i]) * x[columns[i]];
  return sum;
}
// Row r's word: bit k of rows[r] is bit r of masks[k].
inline void transpose_masks(const std::uint16_t* masks, std::uint32_t* rows) {
  for (int r = 0; r < 16; ++r) {
    std::uint32_t word = 0;
    for (int k = 0; k < 32; ++k) word |= (masks[k] >> r & 1u) << k;
    rows[r] = word;
  }
}

}  // namespace
}  // namespace sparseprune::scalar
