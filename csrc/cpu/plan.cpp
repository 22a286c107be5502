// Which strategy serves a call. All cross-overs are here; benchmarks/crossovers.py measures them.
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/linear.h"

namespace sparseprune {
namespace {

constexpr std::int64_t kL2Panel = 1 << 20;  // bytes of a csr panel that stay in L2 beside the weights' stream

std::int64_t lane_block(const KernelTable& table, const PackedHeader& h, Strategy s) {
  std::int64_t lanes = 16 * table.max_lanes;
  if (s == Strategy::csr_batch) {
    while (lanes > 16 && lanes * round_up(h.cols, kTileK) * 4 > kL2Panel) lanes /= 2;
  }
  return lanes;
}

Strategy choose(const KernelTable& table, const PackedHeader& h, std::int64_t batch) {
  const int d = static_cast<int>(h.dtype);
  const auto has = [&](Strategy s) { return table.linear[static_cast<int>(s)][d].run != nullptr; };
  if (h.layout == Layout::csr) return batch <= 1 ? Strategy::csr_gather : Strategy::csr_batch;
  // AMX multiplies 16 batch rows in the time of one; below that the expansion alone fills the time.
  if (has(Strategy::tile_amx) && batch >= 3) return Strategy::tile_amx;
  // Skipping zeros wins where many batch rows share the decoding of the masks.
  if (has(Strategy::tile_batch) && batch >= 48) return Strategy::tile_batch;
  return Strategy::tile_rows;
}

}  // namespace

Plan choose_plan(const KernelTable& table, const PackedHeader& header, std::int64_t batch) {
  const Strategy s = choose(table, header, batch);
  return {s, lane_block(table, header, s)};
}

const char* strategy_name(Strategy s) {
  switch (s) {
    case Strategy::tile_rows: return "tile_rows";
    case Strategy::tile_batch: return "tile_batch";
    case Strategy::tile_amx: return "tile_amx";
    case Strategy::csr_gather: return "csr_gather";
    case Strategy::csr_batch: return "csr_batch";
  }
  return "unknown";
}

}  // namespace sparseprune
