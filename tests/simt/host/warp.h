// What the lanes of a warp do together. Written from the PTX ISA: "Matrix fragments for mma.m16n8k16", "Sparse matrix
// storage" and "Matrix fragments for sparse mma.m16n8k32", "ldmatrix", "shfl.sync".
#pragma once

#include <cstdint>

#include "host/site.h"

namespace sparseprune::simt {

enum class Half : std::uint8_t { bf16, f16 };

float half_to_float(Half type, std::uint16_t bits);
std::uint16_t half_from_float(Half type, float f);  // to nearest even; NaN is 0x7fff, as cvt.rn gives it
std::uint16_t half_fma(Half type, std::uint16_t a, std::uint16_t b, std::uint16_t c);  // rounded once

// c: 4, a: 4, b: 4 and 2.
void warp_mma_sp_m16n8k32(Half type, int selector, float* c, const std::uint32_t* a, const std::uint32_t* b, std::uint32_t e,
                          const Location& at);
void warp_mma_m16n8k16(Half type, float* c, const std::uint32_t* a, const std::uint32_t* b, const Location& at);
void warp_ldmatrix_x4(std::uint32_t* r, const void* row, const Location& at);
void warp_ldmatrix_x2(std::uint32_t* r, const void* row, const Location& at);

enum class Shuffle : std::uint8_t { from, exclusive_or, up };
std::uint32_t warp_shuffle(Shuffle kind, std::uint32_t value, unsigned argument, const Location& at);
std::uint32_t warp_ballot(bool p, const Location& at);
void warp_sync(const Location& at);

}  // namespace sparseprune::simt
