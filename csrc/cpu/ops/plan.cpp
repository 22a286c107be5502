// Which strategy serves a call. All cross-overs are here; benchmarks/crossovers.py measures them. The one to tile_dense dates
// from before every line of a weight was prefetched: on Zen 5 (AVX-512, float32) tile_rows is now the faster by 1.2 times at
// 32 rows, 1.1 at 64 and 1.02 to 1.08 at 256. It stays until it has been measured on a CPU with AMX, too.
#include <stdexcept>
#include <string>

#include "cpu/dispatch/isa.h"
#include "cpu/ops/linear.h"

namespace sparseprune {
namespace {

constexpr std::int64_t kSerialProducts = 64 * 1024;  // work below this is done before a second thread has woken up
constexpr std::int64_t kL2Panel = 1 << 20;           // bytes of a csr panel that stay in L2 beside the weights' stream

Layout layout_of(Strategy s) {
  switch (s) {
    case Strategy::csr_gather:
    case Strategy::csr_batch: return Layout::csr;
    case Strategy::quads_rows: return Layout::quads;
    case Strategy::octets_rows: return Layout::octets;
    case Strategy::bitquads_rows: return Layout::bitquads;
    default: return Layout::tile;
  }
}

bool serves(const KernelTable& table, const PackedHeader& h, Strategy s) {
  return layout_of(s) == h.layout && kernel_of(table, s, h.encoding, h.dtype).run != nullptr;
}

Strategy choose(const KernelTable& table, const PackedHeader& h, std::int64_t batch) {
  if (h.layout == Layout::quads) return Strategy::quads_rows;
  if (h.layout == Layout::octets) return Strategy::octets_rows;
  if (h.layout == Layout::bitquads) return Strategy::bitquads_rows;
  if (h.layout == Layout::csr) return batch <= 2 ? Strategy::csr_gather : Strategy::csr_batch;
  // 16 batch rows cost AMX no more than one, and the expansion hides behind memory from the first.
  if (serves(table, h, Strategy::tile_amx)) return Strategy::tile_amx;
  // Skipping zeros costs about twice as much a weight as multiplying them; it wins when few are left and enough batch
  // rows share the decoding of the masks.
  const bool few = h.nnz < h.rows * h.cols * 35 / 100;
  if (few && batch >= 64 && serves(table, h, Strategy::tile_batch)) return Strategy::tile_batch;
  if (batch > 24 && serves(table, h, Strategy::tile_dense)) return Strategy::tile_dense;
  return Strategy::tile_rows;
}

std::int64_t block_of(const KernelTable& table, const PackedHeader& h, std::int64_t batch, Strategy s) {
  const LinearKernel& kernel = kernel_of(table, s, h.encoding, h.dtype);
  std::int64_t block = kernel.max_block;
  if (kernel.round == 1) return ceil_div(batch, ceil_div(batch, block));  // equal blocks: the last is not a small one
  if (s == Strategy::csr_batch) {
    while (block > kernel.round && block * round_up(h.cols, kTileK) * 4 > kL2Panel) block /= 2;
  }
  return block;
}

}  // namespace

Plan choose_plan(const KernelTable& table, const PackedHeader& header, std::int64_t batch, int forced) {
  const Strategy s = forced < 0 ? choose(table, header, batch) : static_cast<Strategy>(forced);
  if (forced < 0 && !serves(table, header, s)) {
    throw std::invalid_argument("packed: holds " + describe(packing_of(header)) + ", which has no kernel at level '" +
                                table.isa + "'; unpack the weight, or run at a level that has one (SPARSEPRUNE_ISA)");
  }
  if (forced >= kStrategies || !serves(table, header, s)) {
    throw std::invalid_argument(std::string("strategy: ") + strategy_name(s) + " does not serve this weight at level '" +
                                table.isa + "'");
  }
  return {s, block_of(table, header, batch < 1 ? 1 : batch, s), header.nnz * batch < kSerialProducts};
}

const char* strategy_name(Strategy s) {
  switch (s) {
    case Strategy::tile_rows: return "tile_rows";
    case Strategy::tile_dense: return "tile_dense";
    case Strategy::tile_batch: return "tile_batch";
    case Strategy::tile_amx: return "tile_amx";
    case Strategy::csr_gather: return "csr_gather";
    case Strategy::csr_batch: return "csr_batch";
    case Strategy::quads_rows: return "quads_rows";
    case Strategy::octets_rows: return "octets_rows";
    case Strategy::bitquads_rows: return "bitquads_rows";
  }
  return "unknown";
}

}  // namespace sparseprune
