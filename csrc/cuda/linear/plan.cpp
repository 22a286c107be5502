// How a linear is run: the configuration and the splits of least cost by a model of the card.
//
// The model's unit of time is an mma.sp.m16n8k32 of one SM at full rate (1.4 ns on an A100, 3.2 ns on an RTX 4090). In this
// unit the cards are alike: memory brings each SM 20 bytes (A100), 25 (RTX 4090), 22 (H100 by mma.sync), L2 brings 94, 120,
// 90, so that the number of SMs is all that a plan needs to know. The constants are data sheets' and guesses, no
// measurements: benchmarks/gpu_check runs every configuration.
#include <algorithm>
#include <cstddef>
#include <iterator>

#include "core/layouts/bitmap8.h"
#include "cuda/launchers.h"
#include "cuda/linear/bitmap8.h"
#include "cuda/linear/fragments.h"
#include "cuda/linear/sparse24.h"

namespace sparseprune::cuda {
namespace {

constexpr double kMemoryBytes = 20, kL2Bytes = 90;  // an SM gets in a unit of time
constexpr double kSharedBytes = 256;                // an SM's shared memory moves in it (A100; other cards have more)
constexpr double kIssued = 8;                       // an SM's instructions of a warp
constexpr double kMmaRate = 0.85;                   // a fraction of the peak, which no kernel reaches
constexpr double kLatency = 500;                    // from a request to its bytes, memory being busy
constexpr double kLaunch = 1500;                    // a second kernel

// What a strip's 64 columns cost.
struct UnitWork {
  double bytes;         // from memory
  int stage_bytes;      // and their room in shared memory
  double products;      // for 16 rows and 8 batch rows: instructions mma or mma.sp, which take the same time
  double expand = 0;    // instructions of a warp, to make an operand of codes
  double multiply = 0;  // for 16 rows and 8 batch rows: multiply-adds with scales
};

constexpr UnitWork kSparse24Work{kSparse24UnitBytes, kSparse24UnitBytes, 2};

UnitWork fragments_work(const Packing& packing) {
  fragments::Unit unit = fragments::unit_of(packing);
  UnitWork work{static_cast<double>(unit.bytes()), 0, unit.two_four ? 2.0 : 4.0};
  unit.sets = 2;
  work.stage_bytes = unit.bytes();
  const double each = unit.bits == 4 ? 1.4 : packing.dtype == DType::bf16 ? 2.5 : 1;  // fragments.cuh
  work.expand = unit.cols() * each + 10;                                              // 32 rows, a lane each
  work.multiply = unit.two_four ? 4 : unit.minimums ? 16 : 8;
  if (unit.minimums) work.products += 2;  // the sums of x, for both tiles of 16 rows
  return work;
}

// Time of a block of threads for a block of columns. K groups share the SM, so more of them only hide more waiting.
double stage_cost(const ProductConfig& c, const UnitWork& w, std::int64_t batch) {
  const double rows16 = c.units * 2, fragment_b = 512;
  const double warps = c.warps_m * c.warps_n, tiles = rows16 * c.n_tiles;
  const double read = warps * (c.units * w.bytes + c.n_tiles * fragment_b * 2);
  const double issued = warps * (c.units * w.expand + tiles * (w.products + w.multiply));
  const double weights = c.tile_m() / kUnitRows * w.bytes;
  const double x = static_cast<double>(std::min<std::int64_t>(batch, c.tile_n())) * kUnitCols * 2;
  const double compute =
      std::max({warps * tiles * w.products, issued / kIssued, (read + c.stage_bytes(w.stage_bytes)) / kSharedBytes}) /
      kMmaRate;
  const double waiting = kLatency / ((c.stages_of(w.stage_bytes) - 1) * c.warps_k);
  return std::max({compute, (weights + x) / kL2Bytes, waiting});
}

double cost(const ProductConfig& c, const UnitWork& w, std::int64_t rows, std::int64_t cols, std::int64_t batch, int splits,
            int sm_count) {
  const double m = static_cast<double>(rows), n = static_cast<double>(batch), k = static_cast<double>(cols);
  const std::int64_t blocks = ceil_div(cols, kUnitCols);
  const std::int64_t tiles = ceil_div(rows, c.tile_m()) * ceil_div(batch, c.tile_n()) * splits;
  const double columns = static_cast<double>(round_up(ceil_div(blocks, splits), c.warps_k));
  const double block = columns * stage_cost(c, w, batch) + 2 * kLatency;  // the first bytes' way in, the sums' way out
  const double busiest = static_cast<double>(ceil_div(tiles, sm_count)) * block;
  const double memory = (m * k * w.bytes / (kUnitRows * kUnitCols) + n * k * 2 + n * m * 2) / (kMemoryBytes * sm_count);
  // They overlap, if not wholly: of plans that memory limits alike, the one that leaves the SMs more air is better.
  const double both = std::max(busiest, memory) + std::min(busiest, memory) / 8;
  return splits == 1 ? both : both + kLaunch + 2 * splits * n * m * 4 / (kL2Bytes * 2 / 3 * sm_count);
}

template <std::size_t COUNT>
LinearPlan plan_product(const ProductConfig (&configs)[COUNT], const UnitWork& work, std::int64_t rows, std::int64_t cols,
                        std::int64_t batch, int sm_count) {
  constexpr int kMaxSplits = 16;
  const std::int64_t blocks = ceil_div(cols, kUnitCols);
  LinearPlan best{0, 1, 0};
  double least = 0;
  for (int i = 0; i < static_cast<int>(COUNT); ++i) {
    const ProductConfig& c = configs[i];
    for (int splits = 1; splits == 1 || (splits <= kMaxSplits && splits * c.warps_k <= blocks); ++splits) {
      const double now = cost(c, work, rows, cols, batch, splits, sm_count);
      if ((i == 0 && splits == 1) || now < least) least = now, best = {i, splits, 0};
    }
  }
  return best;
}

// Bound by memory, or by expanding bitmaps, which a tile with more batch rows does less often: the narrowest tile that holds
// the batch; of several, the tallest that gives every SM two blocks, since it reads x less often; and splits while there are
// fewer blocks than SMs and every warp keeps four blocks of columns.
template <std::size_t COUNT>
LinearPlan plan_bitmap8(const Bitmap8Config (&configs)[COUNT], std::int64_t rows, std::int64_t cols, std::int64_t batch,
                        int sm_count) {
  const auto tiles = [&](const Bitmap8Config& c) { return ceil_div(rows, c.m) * ceil_div(batch, c.n); };
  int i = 0;
  while (i + 1 < static_cast<int>(COUNT) && configs[i].n < batch) ++i;
  while (i + 1 < static_cast<int>(COUNT) && configs[i + 1].n == configs[i].n && batch >= 4 &&
         tiles(configs[i + 1]) >= 2 * sm_count) {
    ++i;
  }
  const std::int64_t most = ceil_div(cols, bitmap8::kCols) / (4 * configs[i].warps_k);
  const std::int64_t splits = std::min(sm_count / std::max<std::int64_t>(tiles(configs[i]), 1), most);
  return {i, static_cast<int>(std::max<std::int64_t>(splits, 1)), 0};
}

}  // namespace

LinearPlan plan_linear(const Packing& packing, std::int64_t rows, std::int64_t cols, std::int64_t batch, int sm_count) {
  const auto planned = [&] {
    if (packing.layout == Layout::sparse24)
      return plan_product(kSparse24Configs, kSparse24Work, rows, cols, batch, sm_count);
    if (is_of_codes(packing.layout)) {
      return plan_product(kFragmentsConfigs, fragments_work(packing), rows, cols, batch, sm_count);
    }
    return packing.dtype == DType::f32 ? plan_bitmap8(kBitmap8ConfigsF32, rows, cols, batch, sm_count)
                                       : plan_bitmap8(kBitmap8Configs, rows, cols, batch, sm_count);
  };
  LinearPlan plan = planned();
  if (plan.splits > 1) plan.workspace_bytes = plan.splits * batch * rows * 4;
  return plan;
}

int linear_configs(const Packing& packing) {
  if (!is_cuda(packing.layout)) return 0;
  if (packing.layout == Layout::sparse24) return static_cast<int>(std::size(kSparse24Configs));
  if (is_of_codes(packing.layout)) return static_cast<int>(std::size(kFragmentsConfigs));
  return static_cast<int>(packing.dtype == DType::f32 ? std::size(kBitmap8ConfigsF32) : std::size(kBitmap8Configs));
}

const char* linear_config_name(const Packing& packing, int config) {
  if (config < 0 || config >= linear_configs(packing)) return "unknown";
  if (packing.layout == Layout::sparse24) return kSparse24Configs[config].name;
  if (is_of_codes(packing.layout)) return kFragmentsConfigs[config].name;
  return packing.dtype == DType::f32 ? kBitmap8ConfigsF32[config].name : kBitmap8Configs[config].name;
}

}  // namespace sparseprune::cuda
