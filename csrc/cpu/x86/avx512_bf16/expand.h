// What the levels with VBMI2 share: 32 bf16 of a tile restored by one instruction, and the bf16 panel.
#pragma once

#include "cpu/kernels.h"
#include "cpu/x86/avx512/vec.h"

namespace sparseprune::avx512_bf16 {
namespace {

using namespace sparseprune::avx512;

// Masks of interleaved tiles: 32 bits for the columns (2p, 2p + 1) of 16 rows; bit 2 * row + parity.
inline std::uint32_t pair_mask(const std::uint16_t* masks, std::int64_t p) {
  std::uint32_t m;
  std::memcpy(&m, masks + 2 * p, 4);
  return m;
}

inline __m512i expand_pairs(const bf16* values, std::uint32_t mask) {
  return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
}

}  // namespace
}  // namespace sparseprune::avx512_bf16
