// The shape of a block's product, for the linears over strips of 32 rows: sparse24.cuh and fragments.cuh.
#pragma once

namespace sparseprune::cuda {

// What a block may ask for on sm_86, 89 and 120, the least of all that are built for.
constexpr int kMaxShared = 99 * 1024;

// Of the weight: what is loaded, copied and laid out as one piece, a strip's share of a block of columns.
constexpr int kUnitRows = 32, kUnitCols = 64;

// A K group, warps_m x warps_n warps, takes every warps_k-th block of 64 columns.
struct ProductConfig {
  const char* name;
  int warps_m, warps_n, warps_k;
  int units, n_tiles;  // per warp: units of 32 rows, tiles of 8 batch rows
  int stages;          // blocks of columns in shared memory for each K group, one multiplied while the others arrive; or
                       // fewer, as many as there is room for

  constexpr int tile_m() const {
    return kUnitRows * warps_m * units;
  }
  constexpr int tile_n() const {
    return 8 * warps_n * n_tiles;
  }
  constexpr int threads() const {
    return 32 * warps_m * warps_n * warps_k;
  }
  // Weights, a unit taking `unit_bytes`, and activations of one block of columns.
  constexpr int stage_bytes(int unit_bytes) const {
    return warps_m * units * unit_bytes + tile_n() * kUnitCols * 2;
  }
  constexpr int stages_of(int unit_bytes) const {
    const int room = kMaxShared / (warps_k * stage_bytes(unit_bytes));
    return stages < room ? stages : room;
  }
};

}  // namespace sparseprune::cuda
