// The linear of any layout. Its kernels write out and add the bias, or, where the plan has splits, write partial sums to the
// workspace, which are then added up here.
#include "cuda/launchers.h"

namespace sparseprune::cuda {
namespace {

constexpr int kInvalidValue = 1;                          // cudaErrorInvalidValue
constexpr std::int64_t kMaxSplits = 0xffff;               // a dimension of the grid
constexpr std::int64_t kMaxCols = std::int64_t{1} << 30;  // kernels count them in 32 bits

int run(const LinearCall& call, const Geometry& g) {
  if (call.layout == Layout::sparse24) return linear_sparse24(call, g);
  return call.dtype == DType::f32 ? linear_bitmap8_f32(call, g) : linear_bitmap8(call, g);
}

}  // namespace

int linear(const LinearCall& call) {
  if (call.rows == 0 || call.batch == 0) return 0;
  PackedHeader header;
  Geometry g;
  const LinearPlan& plan = call.plan;
  const bool valid = cuda_geometry({call.rows, call.cols, call.dtype}, call.packed_bytes, &header, &g) &&
                     header.layout == call.layout && call.cols <= kMaxCols && plan.config >= 0 &&
                     plan.config < linear_configs(call.layout, call.dtype) && plan.splits >= 1 && plan.splits <= kMaxSplits;
  if (!valid) return kInvalidValue;
  const int error = run(call, g);
  if (error != 0 || plan.splits == 1) return error;
  return sum_splits(call.dtype, static_cast<const float*>(call.workspace), plan.splits, call.batch, call.rows, call.bias,
                    call.out, call.stream);
}

}  // namespace sparseprune::cuda
