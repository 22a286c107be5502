#include "cpu/ops/linear.h"

#include <cstddef>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "core/layouts/csr.h"
#include "cpu/dispatch/isa.h"
#include "cpu/ops/pack.h"
#include "cpu/ops/parallel.h"

namespace sparseprune {
namespace {

// Memory that a thread keeps between calls: fresh pages for every call would cost more than a small layer.
class Buffer {
 public:
  ~Buffer() {
    std::free(data_);
  }
  void* reserve(std::size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, rounded);
      if (!data_) throw std::bad_alloc();
      size_ = rounded;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

// int8 activations share a scale as far as the weight's do, but for no more columns than these.
std::int64_t panel_group(std::int64_t weight_group) {
  return weight_group < 64 ? weight_group : 64;
}

std::int64_t panel_bytes(const LinearKernel& kernel, std::int64_t batch, std::int64_t kpad, std::int64_t group) {
  if (kernel.panel == Panel::bytes) return batch * kpad + 12 * batch * (kpad / group);
  const bool floats = kernel.panel == Panel::rows_f32 || kernel.panel == Panel::blocks_f32;
  return round_up(batch, kernel.round) * kpad * (floats ? 4 : 2);
}

std::int64_t panel_units(Panel panel, std::int64_t batch, std::int64_t kpad) {
  switch (panel) {
    case Panel::rows_f32: return batch;
    case Panel::blocks_f32:
    case Panel::pairs_bf16: return kpad / 16;
    case Panel::tiles_bf16: return kpad / kTileK;
    case Panel::bytes: return kpad / 64;
  }
  return 0;
}

// Whether x already is what the kernel reads: one row of full width (pairs are read as 32-bit words).
bool is_panel(const LinearKernel& kernel, const LinearCall& call, std::int64_t kpad) {
  if (call.batch != 1 || call.cols != kpad || kernel.round != 1 || kernel.panel == Panel::bytes) return false;
  if (kernel.panel == Panel::pairs_bf16) return reinterpret_cast<std::uintptr_t>(call.x) % 4 == 0;
  return call.packing.dtype == DType::f32;
}

}  // namespace

void linear(const LinearCall& call) {
  const PackedView w = view_packed(call.packed, call.packed_bytes);
  const PackedHeader& h = w.header;
  require_same(h, call.rows, call.cols, call.packing);
  const KernelTable& table = kernels();
  const std::uint8_t interleave = h.dtype == DType::bf16 ? table.bf16_interleave : 1;
  if (h.layout == Layout::tile && h.interleave != interleave) {
    throw std::invalid_argument(std::string("packed: was packed for another instruction set than '") + table.isa +
                                "'; unpack it there, pack it here");
  }
  if (call.batch == 0 || call.rows == 0) return;

  const Plan plan = choose_plan(table, h, call.batch, call.strategy);
  const LinearKernel& kernel = kernel_of(table, plan.strategy, h.encoding, h.dtype);

  static thread_local Buffer shared_panel;
  const std::int64_t kpad = w.geometry.kpad;
  const std::int64_t group = panel_group(h.group);
  const bool ready = is_panel(kernel, call, kpad);
  const void* panel =
      ready ? call.x : shared_panel.reserve(static_cast<std::size_t>(panel_bytes(kernel, call.batch, kpad, group)));

  const int columns = csr_column_bytes(call.cols);
  const PanelJob pack{call.x, call.batch,  call.cols,  kpad, call.stride, plan.block, kernel.round, const_cast<void*>(panel),
                      group,  kernel.zero, kernel.flip};
  const PanelFn pack_fn = table.panel[static_cast<int>(kernel.panel)][static_cast<int>(h.dtype)];
  const auto scales = [&](std::int64_t section) {
    return section == 0 ? nullptr : reinterpret_cast<const std::uint16_t*>(call.packed + section);
  };
  const LinearJob job{call.rows,
                      call.cols,
                      kpad,
                      call.batch,
                      plan.block,
                      w.offsets,
                      w.index,
                      columns,
                      w.values,
                      panel,
                      call.bias,
                      call.out,
                      h.dtype,
                      scales(w.geometry.scales),
                      scales(w.geometry.minimums),
                      h.scales,
                      h.group,
                      group};
  const std::int64_t units = ceil_div(call.rows, kernel.unit_rows);
  const std::int64_t pack_units = ready ? 0 : panel_units(kernel.panel, call.batch, kpad);
  const std::size_t scratch_bytes = kernel.scratch_bytes(job);
  const auto scratch = [scratch_bytes] {
    static thread_local Buffer buffer;
    return buffer.reserve(scratch_bytes);
  };

  const int threads = plan.serial ? 1 : usable_threads(call.threads);
  if (threads == 1) {
    if (pack_units > 0) pack_fn(pack, 0, pack_units);
    kernel.run(job, 0, units, scratch());
    return;
  }
  WorkQueue pack_queue(pack_units, threads), queue(units, threads);
  std::atomic<bool> out_of_memory{false};
#pragma omp parallel num_threads(threads)
  {
    std::int64_t begin, end;
    while (pack_queue.next(&begin, &end)) pack_fn(pack, begin, end);
#pragma omp barrier
    try {
      void* own = scratch();
      while (queue.next(&begin, &end)) kernel.run(job, begin, end, own);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace sparseprune
