// The CUDA layouts: where an element of a weight lies, in the order in which tensor cores take it. Shared by the kernels,
// the emulator's tests and docs/formats.md. Every function works within one unit; units lie [strip of rows][block of
// columns].
#pragma once

#include <cstdint>

namespace sparseprune {

#if defined(__CUDACC__)
#define SP_SHARED_CODE __host__ __device__
#else
#define SP_SHARED_CODE
#endif

// 2:4, 16-bit values: the compressed A operand and the metadata of mma.sp.m16n8k32 (PTX ISA, "sparse mma"). A unit is 32
// rows x 64 columns: 2 steps of 32 columns, each of 2 tiles of 16 rows, each of 32 lanes x 8 values (one 16-byte load);
// and 32 lanes x 2 words of metadata (one 8-byte load: a word a step, both tiles by the selectors 0 and 1).
namespace sparse24 {
constexpr int kRows = 32, kCols = 64;
constexpr int kValues = kRows * kCols / 2;  // of a unit
constexpr int kWords = 64;

// A chunk is 4 columns of a row; it keeps two values, at places lower < higher. row: 0 to 31, chunk: 0 to 15.
SP_SHARED_CODE constexpr int value_index(int row, int chunk) {  // of the first of the two
  const int i = row % 16, step = chunk / 8, c = chunk % 8;
  const int lane = 4 * (i % 8) + c % 4, reg = i / 8 + 2 * (c / 4);
  return ((step * 2 + row / 16) * 32 + lane) * 8 + reg * 2;
}
SP_SHARED_CODE constexpr int word_index(int row, int chunk) {
  const int i = row % 16, step = chunk / 8, c = chunk % 8;
  return (4 * (i % 8) + 2 * (row / 16) + c / 4) * 2 + step;
}
SP_SHARED_CODE constexpr int word_shift(int row, int chunk) {  // of the nibble lower | higher << 2
  return 16 * (row % 16 / 8) + 4 * (chunk % 4);
}
}  // namespace sparse24

// Unstructured, any value type: bitmaps of 8 x 8, in the order of the A operand of mma.m16n8k16. A unit is 16 rows x 64
// columns: 4 steps of 16 columns, each of 4 bitmaps (rows 0-7 and 8-15 of the first 8 columns, then of the next 8).
// Bit 8 * row + col: lane L of a warp owns bits 2L and 2L + 1. The values of a unit lie in the order of the bits; zeros
// fill them up to a multiple of 8, so that each unit begins at 16 bytes.
namespace bitmap8 {
constexpr int kRows = 16, kCols = 64;
constexpr int kTiles = 16;  // bitmaps of a unit
constexpr int kRound = 8;   // values of a unit are rounded up to this

SP_SHARED_CODE constexpr int tile_row(int tile) {
  return tile % 2 * 8;
}
SP_SHARED_CODE constexpr int tile_col(int tile) {
  return tile / 4 * 16 + tile % 4 / 2 * 8;
}
}  // namespace bitmap8

}  // namespace sparseprune
