// The contract between the drivers (plain C++) and the instruction sets: a table of function pointers.
//
// A level's `install` overwrites the entries it does better than the levels below it, so a gap falls to the next
// lower level by itself. Kernels get checked arguments; they allocate nothing, call nothing, and never throw.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/encoding.h"
#include "core/layouts/bitquads.h"
#include "core/layouts/tile.h"

namespace sparseprune {

// How activations are laid out for a kernel. k runs over kpad columns; what is not in x is zero. A block is `block`
// batch rows (the last one fewer), its width those rows rounded up to `round`; blocks follow each other.
enum class Panel : std::uint8_t {
  rows_f32,    // float [batch][kpad]
  blocks_f32,  // blocks of float [kpad][width]
  pairs_bf16,  // blocks of bf16 [kpad/2][width][2]
  tiles_bf16,  // bf16 [ceil(batch/16)][kpad/32][16][32]: the A operand of tdpbf16ps
  bytes        // blocks of bytes, quantized in groups of columns: bytes_panel.inl
};
constexpr int kPanels = 5;

struct PanelJob {
  const void* x;
  std::int64_t batch, cols, kpad;
  std::int64_t stride;  // elements between rows of x; columns are contiguous
  std::int64_t block, round;
  void* panel;
  std::int64_t group;  // bytes: columns that share a scale, 32 or 64
  std::int32_t zero;   // bytes: the weights' codes are so much too large
  std::uint8_t flip;   // bytes: xor of each
};
// Units: rows of x (rows_f32), 16 columns (blocks_f32, pairs_bf16), 32 columns (tiles_bf16), 64 columns (bytes).
using PanelFn = void (*)(const PanelJob& job, std::int64_t begin, std::int64_t end);

// out[b, r] = bias[r] + sum_k w[r, k] * x[b, k]
struct LinearJob {
  std::int64_t rows, cols, kpad, batch;
  std::int64_t block;  // batch rows in a panel
  const std::int64_t* offsets;
  const void* index;
  int column_bytes;  // csr: of a column's number
  const void* values;
  const void* panel;
  const void* bias;  // [rows] of the value type, or null
  void* out;         // [batch, rows], contiguous
  DType dtype;       // what bias and out hold
  // Codes:
  const std::uint16_t *scales, *minimums;  // [tiles][groups][16]; minimums or null
  DType scale_dtype;
  std::int64_t group, x_group;  // columns that share a scale, of the weight and of the panel
};
// Computes the output rows of units [begin, end); a unit is `unit_rows` rows. `scratch` is this thread's.
using LinearFn = void (*)(const LinearJob& job, std::int64_t begin, std::int64_t end, void* scratch);

struct LinearKernel {
  Panel panel;
  std::int64_t unit_rows;
  std::int64_t max_block, round;  // batch rows in a panel
  std::size_t (*scratch_bytes)(const LinearJob& job);
  LinearFn run;
  std::int32_t zero = 0;  // as in PanelJob
  std::uint8_t flip = 0;
};

// The ways to multiply; which one serves a call is decided in plan.cpp.
enum class Strategy : std::uint8_t {
  tile_rows,     // lanes are output rows: each weight vector is expanded in a register for a few batch rows
  tile_dense,    // lanes are output rows: weights are expanded to L1 once for all batch rows
  tile_batch,    // lanes are batch rows: zeros cost nothing
  tile_amx,      // expand to AMX tiles, multiply as dense
  csr_gather,    // one dot product a row, activations gathered
  csr_batch,     // lanes are batch rows
  quads_rows,    // dense codes: decoded in registers for a few batch rows, integer sums
  octets_rows,   // 2:4 codes: the same, with activations picked by the kept places
  bitquads_rows  // codes of any zero pattern: expanded to what quads_rows multiplies
};
constexpr int kStrategies = 9;

// Operations on rows of raw words (W bytes an element): a zero is +0.0 or -0.0, NaN is not.
struct WordKernels {
  // out = mask ? in : 0, `mask` bytes of 0 or not 0. in == out is allowed.
  void (*mask_bytes)(const void* in, const std::uint8_t* mask, void* out, std::int64_t n);
  // The same with one bit per element, lowest bit first.
  void (*mask_bits)(const void* in, const std::uint8_t* bits, void* out, std::int64_t n);
  // bits of the non-zeros (padding bits zero); returns their number.
  std::int64_t (*scan)(const void* in, std::uint8_t* bits, std::int64_t n);
  // Kept elements, in order; writes exactly as many as bits are set.
  void (*compress)(const void* in, const std::uint8_t* bits, void* out, std::int64_t n);
  // The inverse: zeros where no bit is set. Reads exactly as many values as bits are set.
  void (*expand)(const void* values, const std::uint8_t* bits, void* out, std::int64_t n);
  // Columns and values of the non-zeros; writes exactly `count` of each.
  void (*csr_row)(const void* in, std::int32_t* cols, void* values, std::int64_t n);
  std::int64_t (*count)(const void* in, std::int64_t n);
};

// The codes of a group of columns: value = (code - zero) * scale + minimum.
struct GroupGrid {
  float scale, inverse, minimum;  // inverse: 1 / scale, 0 where that is 0
  float zero, least, largest;     // of the codes
};

// Weights in training through codes, the columns of one group of one row: rounding.inl. kept: bytes of 0 or not 0, or null.
struct RoundKernels {
  void (*values[kDTypes])(const float* w, const std::uint8_t* kept, std::int64_t n, const GroupGrid& g, void* out);
  void (*codes)(const float* w, const std::uint8_t* kept, std::int64_t n, const GroupGrid& g, std::int8_t* out);
  void (*gradients[kDTypes])(const float* w, const std::uint8_t* kept, const void* gradient, std::int64_t n,
                             const GroupGrid& g, float* of_weight, float* of_scale, float* of_minimum);
};

struct KernelTable {
  const char* isa;
  LinearKernel linear[kStrategies][kEncodings][kDTypes];  // run == nullptr: not at this level; see kernel_of
  PanelFn panel[kPanels][kDTypes];
  std::uint8_t bf16_interleave;  // column order of packed bf16 tiles
  WordKernels words16, words32;
  RoundKernels round;
  // bits[i] = |in[i]| > threshold, out = bits ? in : 0 (NaN is kept). in == out is allowed.
  void (*threshold[kDTypes])(const void* in, float threshold, void* out, std::uint8_t* bits, std::int64_t n);
};

// The place of a kernel in a table. Static, as every function that the levels' units include.
template <typename Table>
static constexpr auto& kernel_of(Table& table, Strategy strategy, Encoding encoding, DType dtype) {
  return table.linear[static_cast<int>(strategy)][static_cast<int>(encoding)][static_cast<int>(dtype)];
}

namespace scalar {
void install(KernelTable& table);
}
namespace avx2 {
void install(KernelTable& table);
}
namespace avx512 {
void install(KernelTable& table);
}
namespace avx512_vbmi2 {
void install(KernelTable& table);
}
namespace avx512_bf16 {
void install(KernelTable& table);
}
namespace amx {
void install(KernelTable& table);
}

}  // namespace sparseprune
