// The kernels for layout sparse24, by config: the one list from which they are instantiated and plans are made. Each serves
// any shape; the first are for few batch rows, the last for many.
#pragma once

#include "core/layouts/sparse24.h"
#include "cuda/linear/product.h"

namespace sparseprune::cuda {

constexpr int kSparse24UnitBytes = sparse24::kValues * 2 + sparse24::kWords * 4;  // values, metadata

// Up to 64 batch rows memory is the limit. An A100 moves 10 bytes a clock and SM and answers after some 800 clocks, an H100
// 15 after some 1100: 8 to 17 KB must be under way in each SM, and the stages that arrive hold 23 KB of weights or more.
// From 128 on the tensor cores are the limit: warps of 64 x 64, the most that 128 accumulators a thread allow, read 200
// bytes of shared memory an mma, of the 256 that an A100 moves meanwhile.
constexpr ProductConfig kSparse24Configs[] = {
    {"n8_m32_k8", 1, 1, 8, 1, 1, 3},   // 8 warps that wait for each other only at the sum
    {"n16_m32_k4", 1, 1, 4, 1, 2, 4},  // as many bytes of x in a stage as of weights
    {"n32_m64_k2", 2, 1, 2, 1, 4, 4},  // two warps share them from here on
    {"n64_m64", 2, 2, 1, 1, 4, 6},     // four: no K groups are needed for parallelism
    {"n64_m128", 2, 2, 1, 2, 4, 4},    // as many columns, half the traffic with L2, half the blocks
    {"n128_m128", 2, 2, 1, 2, 8, 3},   // two blocks an SM where there is shared memory for them
    {"n128_m256", 4, 2, 1, 2, 8, 2},   // 34 bytes of L2 an SM and clock on an A100 that has 47
    {"n256_m128", 2, 4, 1, 2, 8, 2},
};

}  // namespace sparseprune::cuda
