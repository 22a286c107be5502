// 64 bytes and 16 sums as two 256-bit registers, rows 0-7 and 8-15.
#pragma once

#include "cpu/x86/avx2/vec.h"

namespace sparseprune::avx2 {
namespace {

struct Bytes {
  __m256i lo, hi;
};
struct Ints {
  __m256i lo, hi;
};

constexpr int kQuantTiles = 1;
constexpr int kQuantBatch = 4;
constexpr bool kExpandOnce = true;
constexpr std::int64_t kPrefetchQuant = 2048;

inline __m256i load32(const std::uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Bytes load_bytes(const std::uint8_t* p) {
  return {load32(p), load32(p + 32)};
}
inline void store_bytes(std::uint8_t* p, const Bytes& a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), a.hi);
}
inline __m256i broadcast_quad(const std::uint8_t* p) {
  std::int32_t quad;
  std::memcpy(&quad, p, 4);
  return _mm256_set1_epi32(quad);
}
inline Ints broadcast_int(std::int32_t x) {
  return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
inline Ints add(const Ints& a, const Ints& b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline Ints subtract(const Ints& a, const Ints& b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
inline Vec to_floats(const Ints& a) {
  return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}
inline Vec multiply(const Vec& a, __m256 b) {
  return {_mm256_mul_ps(a.lo, b), _mm256_mul_ps(a.hi, b)};
}
inline Vec add_product(const Vec& c, const Vec& a, const Vec& b) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Vec load_scales(const std::uint16_t* p, DType dtype) {
  return dtype == DType::f16 ? load_n(reinterpret_cast<const f16*>(p), 16) : load_n(reinterpret_cast<const bf16*>(p), 16);
}

// As integers, NaN is larger than infinity.
template <int V>
inline float largest_magnitude(const Vec* v) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i a = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) {
    a = _mm256_max_epi32(a, _mm256_and_si256(_mm256_castps_si256(v[i].lo), magnitude));
    a = _mm256_max_epi32(a, _mm256_and_si256(_mm256_castps_si256(v[i].hi), magnitude));
  }
  __m128i b = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
  b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0xb1));
  const int bits = _mm_cvtsi128_si32(b);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
template <int V>
inline std::int32_t quantize(const Vec* v, float inverse, std::uint8_t flip, std::uint8_t* out) {
  const __m256 factor = _mm256_set1_ps(inverse);
  const __m256i all = _mm256_set1_epi32(inverse == 0 ? 0 : -1);  // NaN times 0 is not 0
  __m256i sums = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) {
    const __m256i lo = _mm256_and_si256(all, _mm256_cvtps_epi32(_mm256_mul_ps(v[i].lo, factor)));
    const __m256i hi = _mm256_and_si256(all, _mm256_cvtps_epi32(_mm256_mul_ps(v[i].hi, factor)));
    sums = _mm256_add_epi32(sums, _mm256_add_epi32(lo, hi));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    const __m128i flipped = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(flip)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), flipped);
  }
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

// vpmaddubsw adds pairs of products of an unsigned and a signed byte in 16 bits, where it saturates at 32767.
inline __m256i pairs(__m256i unsigned_bytes, __m256i signed_bytes) {
  return _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
}
inline __m256i widen_pairs(__m256i sums) {
  return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}

// int4: a pair is at most 2 * 15 * 127 (quads) or 2 * 8 * 255 (octets), 8 of either fit in 16 bits: a step of 32 columns
// of quads adds 8, of octets 4.
struct ShortSums {
  using Part = Bytes;  // 16 rows of 2 sums of 16 bits
  static Part open(const Ints&) {
    return {_mm256_setzero_si256(), _mm256_setzero_si256()};
  }
  static Ints close(const Ints& acc, const Part& part) {
    return add(acc, {widen_pairs(part.lo), widen_pairs(part.hi)});
  }
};
static_assert(8 * 2 * 15 * 127 <= 32767 && 4 * 2 * 8 * 255 <= 32767, "a step of 32 columns does not saturate");

// int8: |w| * x with w's sign is at most 2 * 128 * 127 a pair, so that each product is widened at once.
struct LongSums {
  using Part = Ints;
  static Part open(const Ints& acc) {
    return acc;
  }
  static Ints close(const Ints&, const Part& part) {
    return part;
  }
  static __m256i dot8(__m256i acc, __m256i w, __m256i x) {
    return _mm256_add_epi32(acc, widen_pairs(pairs(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))));
  }
};
static_assert(2 * 128 * 127 <= 32767, "a pair does not saturate");

struct QuadInt4 : ShortSums {
  static constexpr int kQuads = 2, kZero = 8;
  static Bytes codes(const Bytes& v, int quad) {
    const __m256i nibble = _mm256_set1_epi8(15);
    if (quad == 0) return {_mm256_and_si256(v.lo, nibble), _mm256_and_si256(v.hi, nibble)};
    return {_mm256_and_si256(_mm256_srli_epi16(v.lo, 4), nibble), _mm256_and_si256(_mm256_srli_epi16(v.hi, 4), nibble)};
  }
  static Part dot(const Part& part, const Bytes& codes, __m256i quad) {
    return {_mm256_add_epi16(part.lo, pairs(codes.lo, quad)), _mm256_add_epi16(part.hi, pairs(codes.hi, quad))};
  }
};
struct QuadInt8 : LongSums {
  static constexpr int kQuads = 1, kZero = 0;
  static Bytes codes(const Bytes& v, int) {
    const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80));
    return {_mm256_xor_si256(v.lo, sign), _mm256_xor_si256(v.hi, sign)};
  }
  static Part dot(const Part& part, const Bytes& values, __m256i quad) {
    return {dot8(part.lo, values.lo, quad), dot8(part.hi, values.hi, quad)};
  }
};

// `bitquads`: values put where the mask keeps some. 8 bits of a mask choose a table's entry, by which vpshufb spreads 8 values.
inline __m128i two8(const std::uint8_t* low, const std::uint8_t* high) {
  std::int64_t halves[2];
  std::memcpy(&halves[0], low, 8);
  std::memcpy(&halves[1], high, 8);
  return _mm_set_epi64x(halves[1], halves[0]);
}
inline __m128i expand_bytes16(const std::uint8_t* values, unsigned low, unsigned high) {
  const __m128i second = _mm_set_epi64x(0x0808080808080808, 0);
  const __m128i index = _mm_or_si128(two8(kExpand.permutation[low], kExpand.permutation[high]), second);
  return _mm_shuffle_epi8(two8(values, values + popcount(low)), index);
}
inline __m256i expand_bytes32(const std::uint8_t* values, std::uint32_t mask) {
  const __m128i low = expand_bytes16(values, mask & 255u, mask >> 8 & 255u);
  const __m128i high = expand_bytes16(values + popcount(mask & 0xffffu), mask >> 16 & 255u, mask >> 24);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
inline Bytes expand_bytes(const std::uint8_t* values, std::uint64_t mask) {
  const auto low = static_cast<std::uint32_t>(mask);
  return {expand_bytes32(values, low), expand_bytes32(values + popcount(low), static_cast<std::uint32_t>(mask >> 32))};
}
struct BitInt4 : QuadInt4 {
  static constexpr int kQuads = 1, kBits = 4;
  static Bytes codes(const Bytes& v, int) {
    return v;
  }
  static Bytes expand(const std::uint8_t* values, std::uint64_t mask, bool high) {
    const Bytes v = QuadInt4::codes(expand_bytes(values, mask), high);
    const __m256i zero = _mm256_set1_epi8(kZero);  // makes a code of a number with a sign
    return {_mm256_xor_si256(v.lo, zero), _mm256_xor_si256(v.hi, zero)};
  }
};
struct BitInt8 : QuadInt8 {
  static constexpr int kBits = 8;
  static Bytes codes(const Bytes& v, int) {
    return v;
  }
  static Bytes expand(const std::uint8_t* values, std::uint64_t mask, bool) {
    return expand_bytes(values, mask);
  }
};

// vpshufb picks of 16 columns: two octets.
inline Bytes pick_index(const Bytes& places, int, int j) {
  const __m256i three = _mm256_set1_epi8(3), first = _mm256_set1_epi32(j % 2 == 0 ? 0x04040000 : 0x0c0c0808);
  const __m256i lo = _mm256_srli_epi16(places.lo, 2 * j), hi = _mm256_srli_epi16(places.hi, 2 * j);
  return {_mm256_or_si256(_mm256_and_si256(lo, three), first), _mm256_or_si256(_mm256_and_si256(hi, three), first)};
}
inline Bytes pick(const std::uint8_t* columns, int half, int j, const Bytes& index) {
  const auto* p = reinterpret_cast<const __m128i*>(columns + 32 * half + j / 2 * 16);
  const __m256i x = _mm256_broadcastsi128_si256(_mm_load_si128(p));
  return {_mm256_shuffle_epi8(x, index.lo), _mm256_shuffle_epi8(x, index.hi)};
}
struct OctetInt4 : ShortSums {
  static constexpr std::uint8_t kFlip = 0x80;
  static constexpr int kBytes = 192;
  static constexpr float kUnit = 1.0f;
  struct Values {
    Bytes v[2];
  };
  static Values load(const std::uint8_t* p) {
    return {{load_bytes(p), load_bytes(p + 64)}};
  }
  static __m256i value(__m256i v, int j) {
    const __m256i code = _mm256_and_si256(j % 2 ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
    return _mm256_sub_epi8(code, _mm256_set1_epi8(8));
  }
  static Bytes octet(const Values& values, int j) {
    return {value(values.v[j / 2].lo, j), value(values.v[j / 2].hi, j)};
  }
  static Part offset(const Part& part, const Bytes& v) {
    const __m256i x = _mm256_set1_epi8(static_cast<char>(0x80));
    return dot(part, v, {x, x});
  }
  static Part dot(const Part& part, const Bytes& v, const Bytes& x) {
    return {_mm256_add_epi16(part.lo, pairs(x.lo, v.lo)), _mm256_add_epi16(part.hi, pairs(x.hi, v.hi))};
  }
};
struct OctetInt8 : LongSums {
  static constexpr std::uint8_t kFlip = 0;
  static constexpr int kBytes = 320;
  static constexpr float kUnit = 1.0f;
  struct Values {
    const std::uint8_t* v;
  };
  static Values load(const std::uint8_t* p) {
    return {p};
  }
  static Bytes octet(const Values& values, int j) {
    return load_bytes(values.v + 64 * j);
  }
  static Part offset(const Part& part, const Bytes&) {
    return part;
  }
  static Part dot(const Part& part, const Bytes& v, const Bytes& x) {
    return {dot8(part.lo, v.lo, x.lo), dot8(part.hi, v.hi, x.hi)};
  }
};

}  // namespace
}  // namespace sparseprune::avx2
