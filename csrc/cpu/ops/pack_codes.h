// The half of pack.h for int8 and int4 codes: between their canonical form and the tiles that kernels read.
//
// Codes: row-major, the kept ones (dense: all); int8, or two int4 a byte, the low nibble first.
#pragma once

#include <cstdint>

#include "cpu/ops/pack.h"

namespace sparseprune {

// PackedHeader::stored of layout bitquads, which depends on the mask; 0 of the others.
std::int64_t stored_codes(std::int64_t rows, std::int64_t cols, const Packing& packing, const std::uint8_t* mask);
void pack_codes(const PackedHeader& h, const Geometry& g, const Canonical& weight, std::uint8_t* blob, int threads);
// offsets: index of each row's first code, for `bitquads` only.
void unpack_codes(const PackedView& v, const std::int64_t* offsets, std::uint8_t* codes, int threads);
void unpack_code_bits(const PackedView& v, std::uint8_t* bits, int threads);
void unpack_code_scales(const PackedView& v, const std::uint8_t* blob, std::uint16_t* scales, std::uint16_t* minimums,
                        int threads);

}  // namespace sparseprune
