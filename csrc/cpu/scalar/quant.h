// 64 bytes and 16 sums in plain C++: the meaning of every operation on quantized weights.
#pragma once

#include "cpu/scalar/vec.h"

namespace sparseprune::scalar {
namespace {

struct Bytes {
  std::uint8_t v[64];
};
struct Ints {
  std::int32_t v[16];
};

constexpr int kQuantTiles = 1;
constexpr int kQuantBatch = 4;
constexpr bool kExpandOnce = true;
constexpr std::int64_t kPrefetchQuant = 1024;

inline Bytes load_bytes(const std::uint8_t* p) {
  Bytes r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store_bytes(std::uint8_t* p, const Bytes& a) {
  std::memcpy(p, a.v, sizeof a.v);
}
// 4 bytes for each of 16 rows.
inline Bytes broadcast_quad(const std::uint8_t* p) {
  Bytes r;
  for (int i = 0; i < 64; ++i) r.v[i] = p[i % 4];
  return r;
}
inline Ints broadcast_int(std::int32_t x) {
  Ints r;
  for (std::int32_t& lane : r.v) lane = x;
  return r;
}
inline Ints subtract(const Ints& a, const Ints& b) {
  Ints r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] - b.v[i];
  return r;
}
inline Vec to_floats(const Ints& a) {
  Vec r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
inline Vec multiply(const Vec& a, float b) {
  Vec r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] * b;
  return r;
}
inline Vec add_product(const Vec& c, const Vec& a, const Vec& b) {
  Vec r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] * b.v[i] + c.v[i];
  return r;
}
inline Vec load_scales(const std::uint16_t* p, DType dtype) {
  return dtype == DType::f16 ? load_n(reinterpret_cast<const f16*>(p), 16) : load_n(reinterpret_cast<const bf16*>(p), 16);
}

// Of V vectors; a NaN is larger than infinity.
template <int V>
inline float largest_magnitude(const Vec* v) {
  std::uint32_t largest = 0;
  for (int i = 0; i < V; ++i) {
    for (const float x : v[i].v) {
      const std::uint32_t bits = float_to_bits(x) & 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
  }
  return bits_to_float(largest);
}
// round(v * inverse) as bytes, ties to even, each xor `flip`; returns their sum before that. inverse = 0: zeros.
template <int V>
inline std::int32_t quantize(const Vec* v, float inverse, std::uint8_t flip, std::uint8_t* out) {
  std::int32_t sum = 0;
  for (int i = 0; i < 16 * V; ++i) {
    constexpr float kRound = 0x1.8p23f;  // adding it leaves no bits for the fraction
    const float q = inverse == 0 ? 0.0f : (v[i / 16].v[i % 16] * inverse + kRound) - kRound;
    sum += static_cast<std::int32_t>(q);
    out[i] = static_cast<std::uint8_t>(static_cast<std::uint8_t>(static_cast<std::int32_t>(q)) ^ flip);
  }
  return sum;
}

// sum of 4 products a row; the first operand's bytes are `First`, the second's are signed.
template <typename First>
inline Ints dot4(const Ints& acc, const Bytes& a, const Bytes& b) {
  Ints r = acc;
  for (int i = 0; i < 64; ++i) {
    r.v[i / 4] += static_cast<std::int32_t>(static_cast<First>(a.v[i])) * static_cast<std::int8_t>(b.v[i]);
  }
  return r;
}

// Sums of a step of 32 columns go straight to those of the group.
struct Exact {
  using Part = Ints;
  static Part open(const Ints& acc) {
    return acc;
  }
  static Ints close(const Ints&, const Part& part) {
    return part;
  }
};
struct QuadInt4 : Exact {
  static constexpr int kQuads = 2, kZero = 8;
  static Bytes codes(const Bytes& v, int quad) {
    Bytes r;
    for (int i = 0; i < 64; ++i) r.v[i] = static_cast<std::uint8_t>(v.v[i] >> (4 * quad) & 15);
    return r;
  }
  static Part dot(const Part& part, const Bytes& codes, const Bytes& quad) {
    return dot4<std::uint8_t>(part, codes, quad);
  }
};
struct QuadInt8 : Exact {
  static constexpr int kQuads = 1, kZero = 128;
  static Bytes codes(const Bytes& v, int) {
    return v;
  }
  static Part dot(const Part& part, const Bytes& codes, const Bytes& quad) {
    return dot4<std::uint8_t>(part, codes, quad);
  }
};

// `bitquads`: a mask's values put in their places, as codes, of 4 columns of 16 rows.
template <typename Code, int bits>
struct Bits : Code {
  static constexpr int kQuads = 1, kBits = bits;
  static Bytes codes(const Bytes& v, int) {
    return v;
  }
  // values: numbers with a sign; of int4 in the low or the high nibbles.
  static Bytes expand(const std::uint8_t* values, std::uint64_t mask, bool high) {
    Bytes r;
    for (int i = 0; i < 64; ++i) {
      const int value = mask >> i & 1u ? *values++ >> (high ? 4 : 0) : 0;
      r.v[i] = static_cast<std::uint8_t>((value & ((1 << bits) - 1)) ^ Code::kZero);
    }
    return r;
  }
};
using BitInt4 = Bits<QuadInt4, 4>;
using BitInt8 = Bits<QuadInt8, 8>;

// Which byte of 64 columns meets each value of octet j of a half.
inline Bytes pick_index(const Bytes& places, int half, int j) {
  Bytes r;
  for (int i = 0; i < 64; ++i) {
    r.v[i] = static_cast<std::uint8_t>(32 * half + 8 * j + i % 4 / 2 * 4 + (places.v[i] >> (2 * j) & 3));
  }
  return r;
}
inline Bytes pick(const std::uint8_t* columns, int, int, const Bytes& index) {
  Bytes r;
  for (int i = 0; i < 64; ++i) r.v[i] = columns[index.v[i]];
  return r;
}
struct OctetExact : Exact {
  static constexpr std::uint8_t kFlip = 0;
  static constexpr float kUnit = 1.0f;
  static Part offset(const Part& part, const Bytes&) {
    return part;
  }
  static Part dot(const Part& part, const Bytes& values, const Bytes& x) {
    return dot4<std::int8_t>(part, x, values);
  }
};
struct OctetInt4 : OctetExact {
  static constexpr int kBytes = 192;
  struct Values {
    Bytes v[2];
  };
  static Values load(const std::uint8_t* p) {
    return {{load_bytes(p), load_bytes(p + 64)}};
  }
  static Bytes octet(const Values& values, int j) {
    Bytes r;
    for (int i = 0; i < 64; ++i) r.v[i] = static_cast<std::uint8_t>((values.v[j / 2].v[i] >> (j % 2 * 4) & 15) - 8);
    return r;
  }
};
struct OctetInt8 : OctetExact {
  static constexpr int kBytes = 320;
  struct Values {
    Bytes v[4];
  };
  static Values load(const std::uint8_t* p) {
    return {{load_bytes(p), load_bytes(p + 64), load_bytes(p + 128), load_bytes(p + 192)}};
  }
  static Bytes octet(const Values& values, int j) {
    return values.v[j];
  }
};

}  // namespace
}  // namespace sparseprune::scalar
