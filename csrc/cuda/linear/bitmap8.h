// The kernels for layout bitmap8, by config: the one list from which they are instantiated and plans are made. Each serves
// any shape.
#pragma once

namespace sparseprune::cuda {

struct Bitmap8Config {
  const char* name;
  int m;        // rows of a block
  int n;        // batch rows of a block
  int warps_k;  // warps that share a block's columns, 64 at a time
  int stages;   // in the ring in shared memory
  int blocks;   // that an SM's registers are to hold
};

// Few batch rows: as many warps as can be, each on columns of its own. From 32 rows of a block on two warps and more share
// x, which is then fetched half as often. More than 64 batch rows take several blocks; there a third stage would leave an SM
// of 164 KB with one block.
constexpr Bitmap8Config kBitmap8Configs[] = {
    {"n8_m16_k8", 16, 8, 8, 3, 2},   {"n8_m32_k4", 32, 8, 4, 3, 2},   {"n16_m32_k4", 32, 16, 4, 3, 2},
    {"n32_m64_k2", 64, 32, 2, 3, 2}, {"n64_m64_k2", 64, 64, 2, 2, 2},
};
// Units are twice as large: of shared memory, which three stages would overfill.
constexpr Bitmap8Config kBitmap8ConfigsF32[] = {
    {"n2_m16_k8", 16, 2, 8, 2, 2},
    {"n8_m32_k4", 32, 8, 4, 2, 2},
    {"n16_m32_k4", 32, 16, 4, 2, 1},
};

}  // namespace sparseprune::cuda
