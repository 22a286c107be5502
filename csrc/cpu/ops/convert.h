// Conversions between dense, canonical (values + bits) and CSR weights; masks. All parallel over rows.
//
// bits: [rows, ceil(cols/8)], lowest bit first, padding zero. offsets: int64 [rows + 1], index of a row's first value.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace sparseprune {

// dense -> bits and offsets of the non-zeros; returns their number.
std::int64_t scan_dense(const Matrix& m, const void* dense, std::uint8_t* bits, std::int64_t* offsets, int threads);
// dense -> offsets alone.
std::int64_t count_dense(const Matrix& m, const void* dense, std::int64_t* offsets, int threads);
// Raises the bits of every group of m_group columns to exactly n; false with the place where a group holds more.
struct GroupError {
  std::int64_t row, group, kept;
};
bool fill_groups(std::int64_t rows, std::int64_t cols, int n, int m_group, std::uint8_t* bits, GroupError* error,
                 int threads);
// offsets of given bits; returns their number, or -1 - row for the first row with a padding bit set.
std::int64_t count_bits(std::int64_t rows, std::int64_t cols, const std::uint8_t* bits, std::int64_t* offsets, int threads);
void compress_dense(const Matrix& m, const void* dense, const std::uint8_t* bits, const std::int64_t* offsets, void* values,
                    int threads);
void expand_dense(const Matrix& m, const void* values, const std::uint8_t* bits, const std::int64_t* offsets, void* dense,
                  int threads);

void dense_to_csr(const Matrix& m, const void* dense, const std::int64_t* crow, std::int32_t* col, void* values,
                  int threads);
// Throws std::invalid_argument where crow or col is not a sorted CSR of this shape.
void csr_to_dense(const Matrix& m, const std::int64_t* crow, const std::int32_t* col, std::int64_t nnz, const void* values,
                  void* dense, int threads);

void mask_bytes(DType dtype, const void* in, const std::uint8_t* mask, void* out, std::int64_t n, int threads);
void mask_bits(const Matrix& m, const void* in, const std::uint8_t* bits, void* out, int threads);
void threshold(const Matrix& m, const void* in, float limit, void* out, std::uint8_t* bits, int threads);
void bytes_to_bits(std::int64_t rows, std::int64_t cols, const std::uint8_t* mask, std::uint8_t* bits, int threads);
void bits_to_bytes(std::int64_t rows, std::int64_t cols, const std::uint8_t* bits, std::uint8_t* mask, int threads);

}  // namespace sparseprune
