// The linear of any layout. Its kernels write out and add the bias, or, where the plan has splits, write partial sums to the
// workspace, which are then added up here.
#include <stdexcept>
#include <string>

#include "core/layouts/bitmap8.h"
#include "core/layouts/fragments.h"
#include "core/layouts/sparse24.h"
#include "cuda/launchers.h"

namespace sparseprune::cuda {
namespace {

constexpr std::int64_t kMaxSplits = 0xffff;               // a dimension of the grid
constexpr std::int64_t kMaxCols = std::int64_t{1} << 30;  // kernels count them in 32 bits

void require(bool ok, const std::string& rule, std::int64_t value) {
  if (!ok) throw std::invalid_argument(rule + ", got " + std::to_string(value));
}

// A plan may come from outside (benchmarks force one), and a workspace is the caller's.
void require_plan(const LinearCall& call, const Geometry& g) {
  const LinearPlan& plan = call.plan;
  const int configs = linear_configs(call.packing);
  require(plan.config >= 0 && plan.config < configs, "config: must be in [0, " + std::to_string(configs) + ")", plan.config);
  require(call.cols <= kMaxCols, "input: must have at most 2^30 columns", call.cols);
  static_assert(sparse24::kCols == 64 && bitmap8::kCols == 64 && fragments::kCols == 64);
  const std::int64_t blocks = g.kpad / 64;
  const std::int64_t most = blocks < kMaxSplits ? blocks : kMaxSplits;
  require(plan.splits >= 1 && plan.splits <= most,
          "splits: must be in [1, " + std::to_string(most) + "] for " + std::to_string(call.cols) + " columns", plan.splits);
  require(call.batch >= 0, "batch: must not be negative", call.batch);
  const std::int64_t needed = plan.splits > 1 ? plan.splits * call.batch * call.rows * 4 : 0;
  const std::int64_t there = call.workspace ? plan.workspace_bytes : 0;
  require(there >= needed,
          "workspace: must hold " + std::to_string(plan.splits) + " times the output in float32, " + std::to_string(needed) +
              " bytes",
          there);
}

int run(const LinearCall& call, const Geometry& g) {
  if (call.packing.layout == Layout::sparse24) return linear_sparse24(call, g);
  if (is_of_codes(call.packing.layout)) return linear_fragments(call, g);
  return call.packing.dtype == DType::f32 ? linear_bitmap8_f32(call, g) : linear_bitmap8(call, g);
}

}  // namespace

int linear(const LinearCall& call) {
  const auto blob = reinterpret_cast<std::uintptr_t>(call.packed);
  const Geometry g = require_hidden(call.rows, call.cols, call.packing, blob, call.packed_bytes).geometry;
  require_plan(call, g);
  if (call.rows == 0 || call.batch == 0) return 0;
  const int error = run(call, g);
  if (error != 0 || call.plan.splits == 1) return error;
  return sum_splits(call.packing.dtype, static_cast<const float*>(call.workspace), call.plan.splits, call.batch, call.rows,
                    call.bias, call.out, call.stream);
}

}  // namespace sparseprune::cuda
