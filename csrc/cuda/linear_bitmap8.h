// The kernels for layout bitmap8, by config: the one list from which they are instantiated and plans are made. Each serves
// any shape.
#pragma once

namespace sparseprune::cuda {

struct Bitmap8Config {
  const char* name;
  int m;        // rows of a block
  int n;        // batch rows of a block
  int warps_k;  // warps that share a block's columns, 64 at a time
  int stages;   // of the ring in shared memory
};

constexpr Bitmap8Config kBitmap8Configs[] = {
    {"n8_m16_k8", 16, 8, 8, 3},    // few batch rows: each warp on columns of its own, waiting for no other
    {"n8_m32_k4", 32, 8, 4, 3},    // many rows: x is fetched half as often, which counts from about 4 batch rows on
    {"n16_m32_k4", 32, 16, 4, 3},  //
    {"n32_m64_k2", 64, 32, 2, 3},  //
    {"n64_m64_k2", 64, 64, 2,
     2},  // more batch rows take several blocks. A third stage would leave one block an SM of 164 KB
};
// Units are twice as large: of shared memory, which three stages would overfill.
constexpr Bitmap8Config kBitmap8ConfigsF32[] = {
    {"n2_m16_k8", 16, 2, 8, 2},
    {"n8_m32_k4", 32, 8, 4, 2},
    {"n16_m32_k4", 32, 16, 4, 2},
};

}  // namespace sparseprune::cuda
