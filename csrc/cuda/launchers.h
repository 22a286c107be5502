// The contract of the CUDA half: pointers to device memory, sizes, a stream; 0 or the CUDA error's code back. A launcher
// allocates nothing and waits for nothing, so it may be captured into a graph. The caller has set the device, checked the
// shapes, and ensured that matrices are contiguous.
//
// bits: uint8 [rows, ceil(cols / 8)], lowest bit first, padding zero. counts and offsets: int64. error: int64 [1], which the
// caller sets to kNoError; the least place where something is wrong is left there.
#pragma once

#include <cstdint>

#include "core/header.h"

namespace sparseprune::cuda {

constexpr std::int64_t kNoError = INT64_MAX;

// masks.cu: out = in where the mask keeps it, else +0.0; out may be in.
int mask_bytes(DType dtype, const void* in, const std::uint8_t* mask, void* out, std::int64_t n, void* stream);
int mask_bits(const Matrix& m, const void* in, const std::uint8_t* bits, void* out, void* stream);
int threshold(const Matrix& m, const void* in, float limit, void* out, std::uint8_t* bits, void* stream);
int bytes_to_bits(std::int64_t rows, std::int64_t cols, const std::uint8_t* mask, std::uint8_t* bits, void* stream);
int bits_to_bytes(std::int64_t rows, std::int64_t cols, const std::uint8_t* bits, std::uint8_t* mask, void* stream);

// convert.cu
// bits (or null) and counts [rows] of the non-zeros.
int scan_dense(const Matrix& m, const void* dense, std::uint8_t* bits, std::int64_t* counts, void* stream);
// counts [rows] of given bits; error: the first row that has a padding bit set.
int count_bits(std::int64_t rows, std::int64_t cols, const std::uint8_t* bits, std::int64_t* counts, std::int64_t* error,
               void* stream);
// Raises the bits of every m columns to n, at the lowest free columns; error: row * (cols / m) + group of the first group
// that holds more.
int fill_groups(std::int64_t rows, std::int64_t cols, int n, int m, std::uint8_t* bits, std::int64_t* error, void* stream);
// offsets [rows + 1]: index of each row's first value.
int compress_dense(const Matrix& m, const void* dense, const std::uint8_t* bits, const std::int64_t* offsets, void* values,
                   void* stream);
int expand_dense(const Matrix& m, const void* values, const std::uint8_t* bits, const std::int64_t* offsets, void* dense,
                 void* stream);
int dense_to_csr(const Matrix& m, const void* dense, const std::int64_t* crow, std::int32_t* col, void* values,
                 void* stream);
// Validates before it reads or writes by an index; error: the first row that is not a sorted CSR of this shape, dense is
// then unspecified.
int csr_to_dense(const Matrix& m, const std::int64_t* crow, const std::int32_t* col, std::int64_t nnz, const void* values,
                 void* dense, std::int64_t* error, void* stream);

// pack/sparse24.cu: dense [rows, cols] (cols % 4 == 0) to values and metadata (core/layouts/sparse24.h) in one pass. bits says
// which two of every four are kept; without it (null) the non-zeros are, filled up at the lowest free columns; error: row *
// (cols / 4) + group of the first group that keeps more (or, by bits, not exactly) two.
int sparse24_pack(const Matrix& m, const void* dense, const std::uint8_t* bits, void* values, std::uint32_t* metadata,
                  std::int64_t* error, void* stream);
// dense and bits, or null for what is not wanted.
int sparse24_unpack(const Matrix& m, const void* values, const std::uint32_t* metadata, void* dense, std::uint8_t* bits,
                    void* stream);

// pack/bitmap8.cu
// Bitmaps of all units [units, 16], and counts [units] of values, rounded up to bitmap8::kRound.
int bitmap8_index(std::int64_t rows, std::int64_t cols, const std::uint8_t* bits, std::uint64_t* index, std::int64_t* counts,
                  void* stream);
int bitmap8_pack(const Matrix& m, const void* dense, const std::uint64_t* index, const std::int64_t* offsets, void* values,
                 void* stream);
// stored: values there are; a unit whose offset lies elsewhere is given zeros.
int bitmap8_unpack(const Matrix& m, const std::uint64_t* index, const std::int64_t* offsets, const void* values,
                   std::int64_t stored, void* dense, std::uint8_t* bits, void* stream);

// pack/fragments.cu: codes (int8 [n], or two int4 to a byte), those of the kept entries in row-major order, to units
// (core/layouts/fragments.h) and back. mask: the bits of 2:4 weights, two of every four columns; null for dense ones. scales and
// minimums: 16 bits [rows, ceil(cols / group)]; minimums are null where the encoding has none.
int fragments_pack(const Packing& packing, std::int64_t rows, std::int64_t cols, const std::uint8_t* codes,
                   const std::uint8_t* mask, const std::uint16_t* scales, const std::uint16_t* minimums, std::uint8_t* units,
                   void* stream);
int fragments_unpack(const Packing& packing, std::int64_t rows, std::int64_t cols, const std::uint8_t* units,
                     std::uint8_t* codes, std::uint8_t* mask, std::uint16_t* scales, std::uint16_t* minimums, void* stream);
// out [count, cols] in the packing's dtype: rows of a dense weight; NaN for an index that is not one. Throws
// std::invalid_argument for a 2:4 one.
int fragments_lookup(const Packing& packing, std::int64_t rows, std::int64_t cols, const std::uint8_t* units,
                     const std::int64_t* indices, std::int64_t count, void* out, void* stream);

// plan.cpp: how a linear of this shape is run. Depends on the shape and the card alone: the caller keeps it.
struct LinearPlan {
  int config;                    // which of the layout's kernels; linear_config_name names it
  int splits;                    // blocks that share a sum over columns; 1: none
  std::int64_t workspace_bytes;  // float32 [splits, batch, rows] where splits > 1, else 0
};
LinearPlan plan_linear(const Packing& packing, std::int64_t rows, std::int64_t cols, std::int64_t batch, int sm_count);
int linear_configs(const Packing& packing);  // how many there are; each serves any shape
const char* linear_config_name(const Packing& packing, int config);

struct LinearCall {
  Packing packing;
  std::int64_t rows, cols, batch;
  const std::uint8_t* packed;
  std::int64_t packed_bytes;
  const void* x;  // [batch, cols], rows `stride` elements apart, any alignment of its dtype
  std::int64_t stride;
  const void* bias;  // [rows] or null
  void* out;         // [batch, rows], contiguous
  void* workspace;   // plan.workspace_bytes
  LinearPlan plan;
  void* stream;
};
// out = x weight^T + bias, float32 sums. Throws std::invalid_argument where blob, plan or workspace do not fit the call.
// linear.cpp; the kernels: linear/sparse24.cu, fragments.cu, bitmap8.cu, bitmap8_f32.cu.
int linear(const LinearCall& call);
int linear_sparse24(const LinearCall& call, const Geometry& geometry);
int linear_fragments(const LinearCall& call, const Geometry& geometry);    // int8 and int4 codes: bf16, f16
int linear_bitmap8(const LinearCall& call, const Geometry& geometry);      // bf16, f16: tensor cores
int linear_bitmap8_f32(const LinearCall& call, const Geometry& geometry);  // float32: plain multiply-adds
// splits.cu: out = sum over the splits of partial [splits, batch, rows], plus bias.
int sum_splits(DType dtype, const float* partial, int splits, std::int64_t batch, std::int64_t rows, const void* bias,
               void* out, void* stream);

}  // namespace sparseprune::cuda
