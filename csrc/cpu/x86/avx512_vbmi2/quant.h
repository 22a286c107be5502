// 64 bytes and 16 sums as one 512-bit register (AVX-512 VBMI and VNNI).
#pragma once

#include "cpu/x86/avx512/vec.h"

namespace sparseprune::avx512_vbmi2 {
namespace {

using namespace sparseprune::avx512;

using Bytes = __m512i;
using Ints = __m512i;

constexpr int kQuantTiles = 2;
constexpr int kQuantBatch = 8;  // 16 sums; with 24, GCC spills and the kernel is slower
constexpr bool kExpandOnce = false;
constexpr std::int64_t kPrefetchQuant = 2048;

inline Bytes load_bytes(const std::uint8_t* p) {
  return _mm512_loadu_si512(p);
}
inline void store_bytes(std::uint8_t* p, Bytes a) {
  _mm512_storeu_si512(p, a);
}
inline Bytes broadcast_quad(const std::uint8_t* p) {
  std::int32_t quad;
  std::memcpy(&quad, p, 4);
  return _mm512_set1_epi32(quad);
}
inline Ints broadcast_int(std::int32_t x) {
  return _mm512_set1_epi32(x);
}
inline Ints subtract(Ints a, Ints b) {
  return _mm512_sub_epi32(a, b);
}
inline Vec to_floats(Ints a) {
  return _mm512_cvtepi32_ps(a);
}
inline Vec multiply(Vec a, __m512 b) {
  return _mm512_mul_ps(a, b);
}
inline Vec add_product(Vec c, Vec a, Vec b) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Vec load_scales(const std::uint16_t* p, DType dtype) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return dtype == DType::f16 ? widen(raw, static_cast<const f16*>(nullptr)) : widen(raw, static_cast<const bf16*>(nullptr));
}

// As integers, NaN is larger than infinity.
template <int V>
inline float largest_magnitude(const Vec* v) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) {
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(v[i]), magnitude));
  }
  const int bits = _mm512_reduce_max_epi32(largest);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
template <int V>
inline std::int32_t quantize(const Vec* v, float inverse, std::uint8_t flip, std::uint8_t* out) {
  const __m512 factor = _mm512_set1_ps(inverse);
  const __mmask16 all = inverse == 0 ? 0 : 0xffff;  // NaN times 0 is not 0
  __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) {
    const __m512i q = _mm512_maskz_cvtps_epi32(all, _mm512_mul_ps(v[i], factor));
    sum = _mm512_add_epi32(sum, q);
    const __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(q), _mm_set1_epi8(static_cast<char>(flip)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), bytes);
  }
  return _mm512_reduce_add_epi32(sum);
}

// Sums of a step of 32 columns go straight to those of the group.
struct Exact {
  using Part = Ints;
  static Part open(Ints acc) {
    return acc;
  }
  static Ints close(Ints, Part part) {
    return part;
  }
};
struct QuadInt4 : Exact {
  static constexpr int kQuads = 2, kZero = 8;
  static Bytes codes(Bytes v, int quad) {
    return _mm512_and_si512(quad == 0 ? v : _mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
  }
  static Part dot(Part part, Bytes codes, Bytes quad) {
    return _mm512_dpbusd_epi32(part, codes, quad);
  }
};
struct QuadInt8 : Exact {
  static constexpr int kQuads = 1, kZero = 128;
  static Bytes codes(Bytes v, int) {
    return v;
  }
  static Part dot(Part part, Bytes codes, Bytes quad) {
    return _mm512_dpbusd_epi32(part, codes, quad);
  }
};

// `bitquads`: values put where the mask keeps some, and numbers with a sign made codes. Merged into zeros for the reason in
// avx512_bf16/expand.h.
inline Bytes expand_bytes(const std::uint8_t* values, std::uint64_t mask) {
  Bytes zeros = _mm512_setzero_si512();
  __asm__("" : "+v"(zeros));
  return _mm512_mask_expand_epi8(zeros, mask, load_bytes(values));
}
struct BitInt4 : QuadInt4 {
  static constexpr int kQuads = 1, kBits = 4;
  static Bytes codes(Bytes v, int) {
    return v;
  }
  static Bytes expand(const std::uint8_t* values, std::uint64_t mask, bool high) {
    const Bytes v = expand_bytes(values, mask), nibbles = high ? _mm512_srli_epi16(v, 4) : v;
    return _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi8(15), _mm512_set1_epi8(kZero), 0x6a);  // (nibble & 15) ^ 8
  }
};
struct BitInt8 : QuadInt8 {
  static constexpr int kBits = 8;
  static Bytes expand(const std::uint8_t* values, std::uint64_t mask, bool) {
    return _mm512_xor_si512(expand_bytes(values, mask), _mm512_set1_epi8(static_cast<char>(kZero)));
  }
};

// First column of each byte's 4 columns, octet j of 64 columns.
struct OctetColumns {
  alignas(64) std::uint8_t first[8][64];
};
constexpr OctetColumns make_octet_columns() {
  OctetColumns t{};
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < 64; ++i) t.first[j][i] = static_cast<std::uint8_t>(8 * j + i % 4 / 2 * 4);
  }
  return t;
}
constexpr OctetColumns kOctetColumns = make_octet_columns();

inline Bytes pick_index(Bytes places, int half, int j) {
  const __m512i first = _mm512_load_si512(kOctetColumns.first[4 * half + j]);
  const __m512i place = j == 0 ? places : _mm512_srli_epi16(places, static_cast<unsigned>(2 * j));
  return _mm512_ternarylogic_epi32(place, _mm512_set1_epi8(3), first, 0xea);  // place & 3 | first
}
inline Bytes pick(const std::uint8_t* columns, int, int, Bytes index) {
  return _mm512_permutexvar_epi8(index, _mm512_load_si512(columns));
}
// vpdpbusd takes one operand without a sign: the activations, 128 too large.
struct OctetFlipped : Exact {
  static constexpr std::uint8_t kFlip = 0x80;
  static Part offset(Part part, Bytes values) {
    return dot(part, values, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static Part dot(Part part, Bytes values, Bytes x) {
    part = _mm512_dpbusd_epi32(part, x, values);
    // In order: GCC would bring together the products of one sum, and spill the indices of all octets for it.
    __asm__ volatile("" : "+v"(part));
    return part;
  }
};
struct OctetInt4 : OctetFlipped {
  static constexpr int kBytes = 192;
  static constexpr float kUnit = 1.0f / 16;  // values stay in the high nibbles
  struct Values {
    Bytes v[2];
  };
  static Values load(const std::uint8_t* p) {
    return {{load_bytes(p), load_bytes(p + 64)}};
  }
  static Bytes octet(const Values& values, int j) {
    const Bytes high = j % 2 ? values.v[j / 2] : _mm512_slli_epi16(values.v[j / 2], 4);
    const __m512i nibble = _mm512_set1_epi8(static_cast<char>(0xf0)), sign = _mm512_set1_epi8(static_cast<char>(0x80));
    return _mm512_ternarylogic_epi32(high, nibble, sign, 0x6a);  // (high & nibble) ^ sign: 16 * (code - 8)
  }
};
struct OctetInt8 : OctetFlipped {
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
};

}  // namespace
}  // namespace sparseprune::avx512_vbmi2
