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

// Merged into zeros, not zero-masked: on Zen 4 and 5 vpexpandw waits for what its destination held before, zero-masked or not,
// and a fresh zero is there at once.
inline __m512i expand_pairs(const bf16* values, std::uint32_t mask) {
  __m512i zeros = _mm512_setzero_si512();
  __asm__("" : "+v"(zeros));  // or GCC would make zero-masking of it
  return _mm512_mask_expand_epi16(zeros, mask, _mm512_loadu_si512(values));
}

}  // namespace
}  // namespace sparseprune::avx512_bf16
