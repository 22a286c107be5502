// The kernels for layouts fragments and fragments24, by config: the one list from which they are instantiated, each for every
// encoding, and plans are made. Each serves any shape.
#pragma once

#include "core/layouts/fragments.h"
#include "cuda/linear/product.h"

namespace sparseprune::cuda {

static_assert(kUnitRows == fragments::kRows && kUnitCols == fragments::kCols);

// What is expanded and multiplied before the sums are scaled: 2 steps of the instruction, 32 columns or 64 (2:4).
constexpr int kSlabSteps = 2;

// Few, for each of them is compiled ten times. A unit of int4 is 1.1 KB, of 2:4 less: more stages than for 16 bits hold as
// many bytes under way (sparse24.h). From 64 batch rows on the tensor cores are the limit. Expanding codes is work that warps
// of the same rows do again, so a warp has 32 rows, one unit, and many batch rows: as many as its registers hold sums for.
constexpr ProductConfig kFragmentsConfigs[] = {
    {"n8_m32_k8", 1, 1, 8, 1, 1, 4},
    {"n32_m64_k2", 2, 1, 2, 1, 4, 4},
    {"n64_m128", 4, 1, 1, 1, 8, 4},
    {"n128_m128", 4, 2, 1, 1, 8, 3},
};

}  // namespace sparseprune::cuda
