#include "host/warp.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <string>

#include "host/machine.h"
#include "host/memory.h"
#include "host/report.h"

namespace sparseprune::simt {

namespace {

// Exact, without tables: the exponent is rescaled by a product, which also normalises subnormals.
float f16_to_float(std::uint16_t bits) {
  const std::uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  if ((bits & 0x7c00) == 0x7c00) return std::bit_cast<float>(magnitude | 0x70000000u | sign);
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f) | sign);
}

std::uint16_t f16_from_float(float f) {
  if (std::isnan(f)) return 0x7fff;
  const std::uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float magnitude = std::fabs(f);
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // 65504 and half a unit in the last place
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  // The unit in the last place: 2^-10 of the leading bit, or that of the subnormals. nearbyint rounds half to even.
  const int unit = magnitude < 0x1p-14f ? -24 : exponent - 11;
  const auto units = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // A carry out of the significand moves into the exponent by itself.
  return static_cast<std::uint16_t>(sign | (static_cast<std::uint32_t>(unit + 24) * 1024 + units));
}

template <Half type>
float value_of(std::uint16_t bits) {
  if constexpr (type == Half::bf16) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  } else {
    return f16_to_float(bits);
  }
}
template <Half type>
float low(std::uint32_t pair) {
  return value_of<type>(static_cast<std::uint16_t>(pair));
}
template <Half type>
float high(std::uint32_t pair) {
  return value_of<type>(static_cast<std::uint16_t>(pair >> 16));
}

struct Mma {
  float* c;
  const std::uint32_t* a;
  const std::uint32_t* b;
  std::uint32_t e;
};

constexpr int kM = 16, kN = 8;

const Mma& lane_of(void* const (&operands)[kLanes], int lane) {
  return *static_cast<const Mma*>(operands[lane]);
}

// B, k x 8: register r of lane 4g + t holds rows 8r + 2t and the next of column g.
template <Half type, int K>
void gather_b(void* const (&operands)[kLanes], float (&b)[K][kN]) {
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < K / 8; ++r) {
      const std::uint32_t pair = lane_of(operands, lane).b[r];
      b[8 * r + 2 * t][g] = low<type>(pair);
      b[8 * r + 2 * t + 1][g] = high<type>(pair);
    }
  }
}

// C, 16 x 8: lane 4g + t holds columns 2t and the next of row g, then of row g + 8.
template <typename F>
void for_each_c(void* const (&operands)[kLanes], const F& f) {
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    float* c = lane_of(operands, lane).c;
    for (int i = 0; i < 4; ++i) f(g + i / 2 * 8, 2 * t + i % 2, c[i]);
  }
}

inline void multiply_add(float (&sum)[kN], float a, const float (&b)[kN]) {
  for (int n = 0; n < kN; ++n) sum[n] += a * b[n];
}

template <Half type>
void complete_mma(void* const (&operands)[kLanes], const Location&) {
  ++counts().mma;
  float b[16][kN], c[kM][kN];
  gather_b<type>(operands, b);
  for_each_c(operands, [&](int i, int n, float& v) { c[i][n] = v; });
  // A: register j of lane 4g + t holds columns 2t + 8(j / 2) and the next of row g + 8(j % 2).
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < 4; ++j) {
      const std::uint32_t pair = lane_of(operands, lane).a[j];
      const int row = g + j % 2 * 8, k = 2 * t + j / 2 * 8;
      multiply_add(c[row], low<type>(pair), b[k]);
      multiply_add(c[row], high<type>(pair), b[k + 1]);
    }
  }
  for_each_c(operands, [&](int i, int n, float& v) { v = c[i][n]; });
}

template <Half type, int F>
void complete_mma_sp(void* const (&operands)[kLanes], const Location& at) {
  ++counts().mma_sp;
  float b[32][kN], c[kM][kN];
  gather_b<type>(operands, b);
  for_each_c(operands, [&](int i, int n, float& v) { c[i][n] = v; });
  for (int i = 0; i < kM; ++i) {
    for (int chunk = 0; chunk < 8; ++chunk) {
      const std::uint32_t pair = lane_of(operands, 4 * (i % 8) + chunk % 4).a[i / 8 + chunk / 4 * 2];
      const std::uint32_t e = lane_of(operands, 4 * (i % 8) + 2 * F + chunk / 4).e;
      const std::uint32_t nibble = e >> (16 * (i / 8) + 4 * (chunk % 4)) & 15;
      const int first = static_cast<int>(nibble & 3), second = static_cast<int>(nibble >> 2);
      if (first >= second) {
        fault(at, "mma.sp: metadata of row " + std::to_string(i) + ", columns " + std::to_string(4 * chunk) + " to " +
                      std::to_string(4 * chunk + 3) + " names places " + std::to_string(first) + ", " +
                      std::to_string(second) + ", which must increase");
      }
      multiply_add(c[i], low<type>(pair), b[4 * chunk + first]);
      multiply_add(c[i], high<type>(pair), b[4 * chunk + second]);
    }
  }
  for_each_c(operands, [&](int i, int n, float& v) { v = c[i][n]; });
}

struct Rows {
  std::uint32_t* r;
  const void* row;
};

template <int Matrices>
void complete_ldmatrix(void* const (&operands)[kLanes], const Location& at) {
  ++counts().ldmatrix;
  const void* rows[kLanes];
  for (unsigned lane = 0; lane < 8 * Matrices; ++lane) rows[lane] = static_cast<const Rows*>(operands[lane])->row;
  read_rows(rows, 8 * Matrices, at);
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    for (unsigned j = 0; j < Matrices; ++j) {
      const char* row = static_cast<const char*>(rows[8 * j + lane / 4]);
      std::memcpy(static_cast<Rows*>(operands[lane])->r + j, row + lane % 4 * 4, 4);
    }
  }
}

struct Shuffled {
  std::uint32_t value, result;
  unsigned argument;
};

template <Shuffle kind>
void complete_shuffle(void* const (&operands)[kLanes], const Location&) {
  ++counts().shuffles;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    auto& mine = *static_cast<Shuffled*>(operands[lane]);
    unsigned from = mine.argument % kLanes;
    if (kind == Shuffle::exclusive_or) from = lane ^ from;
    if (kind == Shuffle::up) from = mine.argument <= lane ? lane - mine.argument : lane;
    mine.result = static_cast<const Shuffled*>(operands[from])->value;
  }
}

void complete_ballot(void* const (&operands)[kLanes], const Location&) {
  ++counts().shuffles;
  std::uint32_t votes = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    votes |= static_cast<const Shuffled*>(operands[lane])->value << lane;
  }
  for (void* const operand : operands) static_cast<Shuffled*>(operand)->result = votes;
}

void complete_sync(void* const (&)[kLanes], const Location&) {
  ++counts().sync_warp;
  tick_warp(machine.self->warp);
}

}  // namespace

float half_to_float(Half type, std::uint16_t bits) {
  return type == Half::bf16 ? value_of<Half::bf16>(bits) : value_of<Half::f16>(bits);
}

std::uint16_t half_from_float(Half type, float f) {
  if (type == Half::f16) return f16_from_float(f);
  if (std::isnan(f)) return 0x7fff;
  const auto bits = std::bit_cast<std::uint32_t>(f);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A product of two halves is exact in double. Its sum with c is rounded to odd at 53 bits, then at 24, so that the last
// rounding sees which side of the middle the exact sum is on [Boldo and Melquiond, Emulation of FMA and correctly rounded
// sums, IEEE Trans. Computers 57(4), 2008].
std::uint16_t half_fma(Half type, std::uint16_t a, std::uint16_t b, std::uint16_t c) {
  const double product = static_cast<double>(half_to_float(type, a)) * half_to_float(type, b);
  const double addend = half_to_float(type, c);
  double sum = product + addend;
  const double part = sum - product, error = (product - (sum - part)) + (addend - part);  // 2Sum
  if (error != 0 && std::isfinite(sum) && (std::bit_cast<std::uint64_t>(sum) & 1) == 0) {
    sum = std::nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL);
  }
  auto narrow = static_cast<float>(sum);
  if (std::isfinite(narrow) && narrow != sum && (std::bit_cast<std::uint32_t>(narrow) & 1) == 0) {
    narrow = std::nextafter(narrow, sum > narrow ? HUGE_VALF : -HUGE_VALF);
  }
  return half_from_float(type, narrow);
}

void warp_mma_sp_m16n8k32(Half type, int selector, float* c, const std::uint32_t* a, const std::uint32_t* b, std::uint32_t e,
                          const Location& at) {
  constexpr Complete table[2][2] = {{complete_mma_sp<Half::bf16, 0>, complete_mma_sp<Half::bf16, 1>},
                                    {complete_mma_sp<Half::f16, 0>, complete_mma_sp<Half::f16, 1>}};
  Mma mine{c, a, b, e};
  join_warp("mma.sp", table[static_cast<int>(type)][selector], &mine, at);
}

void warp_mma_m16n8k16(Half type, float* c, const std::uint32_t* a, const std::uint32_t* b, const Location& at) {
  Mma mine{c, a, b, 0};
  join_warp("mma", type == Half::bf16 ? complete_mma<Half::bf16> : complete_mma<Half::f16>, &mine, at);
}

void warp_ldmatrix_x4(std::uint32_t* r, const void* row, const Location& at) {
  Rows mine{r, row};
  join_warp("ldmatrix", complete_ldmatrix<4>, &mine, at);
}
void warp_ldmatrix_x2(std::uint32_t* r, const void* row, const Location& at) {
  Rows mine{r, row};
  join_warp("ldmatrix", complete_ldmatrix<2>, &mine, at);
}

std::uint32_t warp_shuffle(Shuffle kind, std::uint32_t value, unsigned argument, const Location& at) {
  constexpr Complete table[] = {complete_shuffle<Shuffle::from>, complete_shuffle<Shuffle::exclusive_or>,
                                complete_shuffle<Shuffle::up>};
  Shuffled mine{value, 0, argument};
  join_warp("shuffle", table[static_cast<int>(kind)], &mine, at);
  return mine.result;
}

std::uint32_t warp_ballot(bool p, const Location& at) {
  Shuffled mine{p, 0, 0};
  join_warp("ballot", complete_ballot, &mine, at);
  return mine.result;
}

void warp_sync(const Location& at) {
  join_warp("sync_warp", complete_sync, nullptr, at);
}

}  // namespace sparseprune::simt
