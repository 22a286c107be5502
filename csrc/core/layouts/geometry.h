// What all layouts share: one blob, a header and 64-byte aligned sections. Drawn in docs/formats.md.
#pragma once

#include <cstdint>

namespace sparseprune {

#if defined(__CUDACC__)
#define SP_SHARED_CODE __host__ __device__
#else
#define SP_SHARED_CODE
#endif

// Static: the levels' units must share no function, or the linker may keep the copy that an older CPU cannot run.
static constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
static constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return ceil_div(a, b) * b;
}

constexpr std::int64_t kHeaderBytes = 64;
constexpr std::int64_t kAlign = 64;
constexpr std::int64_t kTailBytes = 64;  // on a CPU: a vector load may read this far past the last value

// Byte offsets of the sections of a blob.
struct Geometry {
  std::int64_t units;    // tile and layouts of codes: row tiles, csr: rows, on a GPU: strips of rows x blocks of columns
  std::int64_t kpad;     // columns rounded up to whole blocks, at least one: no kernel meets an empty K
  std::int64_t offsets;  // int64 [units + 1]: where each unit's values begin; none where units are of one size
  std::int64_t index;    // where values belong: each layout's own
  std::int64_t values;
  std::int64_t scales, minimums;  // [units, groups of columns, rows of a unit]; 0 where there are none, or within units
  std::int64_t total;
};

static constexpr std::int64_t at_least_one(std::int64_t cols) {
  return cols > 0 ? cols : 1;
}

}  // namespace sparseprune
