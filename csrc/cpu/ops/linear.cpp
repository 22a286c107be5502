#include "cpu/ops/linear.h"

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/dispatch/isa.h"
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

// Work below this is done before a second thread has woken up.
constexpr std::int64_t kSerialProducts = 64 * 1024;

std::int64_t panel_bytes(const LinearKernel& kernel, std::int64_t batch, std::int64_t kpad) {
  const bool floats = kernel.panel == Panel::rows_f32 || kernel.panel == Panel::blocks_f32;
  return round_up(batch, kernel.round) * kpad * (floats ? 4 : 2);
}

std::int64_t panel_units(Panel panel, std::int64_t batch, std::int64_t kpad) {
  switch (panel) {
    case Panel::rows_f32: return batch;
    case Panel::blocks_f32:
    case Panel::pairs_bf16: return kpad / 16;
    case Panel::tiles_bf16: return kpad / kTileK;
  }
  return 0;
}

// Whether x already is what the kernel reads: one row of full width (pairs are read as 32-bit words).
bool is_panel(const LinearKernel& kernel, const LinearCall& call, std::int64_t kpad) {
  if (call.batch != 1 || call.cols != kpad || kernel.round != 1) return false;
  if (kernel.panel == Panel::pairs_bf16) return reinterpret_cast<std::uintptr_t>(call.x) % 4 == 0;
  return call.dtype == DType::f32;
}

// The weight is what it is: an argument that does not go with it is what the caller has to mend.
void require_match(const PackedHeader& h, const LinearCall& call) {
  const std::string weight = " of the packed weight [" + std::to_string(h.rows) + ", " + std::to_string(h.cols) + "]";
  if (h.cols != call.cols) {
    throw std::invalid_argument("input: must have the " + std::to_string(h.cols) + " columns" + weight + ", got " +
                                std::to_string(call.cols) + "; check the layer before this one");
  }
  if (h.dtype != call.dtype) {
    throw std::invalid_argument(std::string("input: dtype must be the weight's ") + dtype_name(h.dtype) + ", got " +
                                dtype_name(call.dtype) + "; cast the input, or pack the weight in that dtype");
  }
  if (h.rows != call.rows) {
    throw std::invalid_argument("out_features: must be the " + std::to_string(h.rows) + " rows" + weight + ", got " +
                                std::to_string(call.rows));
  }
}

}  // namespace

PackedView view_packed(const std::uint8_t* blob, std::int64_t size) {
  PackedView v{};
  if (size < static_cast<std::int64_t>(sizeof(PackedHeader))) {
    throw std::invalid_argument("packed: must hold a header of 64 bytes, got " + std::to_string(size) +
                                " bytes; make packed weights with ops.pack");
  }
  std::memcpy(&v.header, blob, sizeof v.header);
  const PackedHeader& h = v.header;
  if (std::memcmp(h.magic, kMagic, 8) != 0 || h.version != kPackedVersion) {
    throw std::invalid_argument("packed: not a packed weight of version " + std::to_string(kPackedVersion) +
                                "; make packed weights with ops.pack");
  }
  if (h.checksum != header_checksum(h)) {
    throw std::invalid_argument("packed: the header is damaged; pack the weight again");
  }
  if (is_cuda(h.layout)) {
    throw std::invalid_argument(
        "packed: holds a weight packed for CUDA; move the layer with .to(device), not its buffer alone");
  }
  constexpr std::int64_t kMax = std::int64_t{1} << 40;
  const bool sane = static_cast<int>(h.dtype) < kDTypes && static_cast<int>(h.layout) < 2 && h.rows >= 0 && h.cols >= 0 &&
                    h.nnz >= 0 && h.rows < kMax && h.cols < kMax && h.nnz < kMax &&
                    (h.interleave == 1 || h.interleave == 2) && (h.column_bytes == 2 || h.column_bytes == 4) &&
                    (h.cols == 0 || h.rows < kMax / h.cols);
  if (sane) v.geometry = geometry_of(h);
  if (!sane || v.geometry.total != size) {
    throw std::invalid_argument("packed: the header does not fit the size of " + std::to_string(size) +
                                " bytes; the weight is damaged, pack it again");
  }
  v.offsets = reinterpret_cast<const std::int64_t*>(blob + v.geometry.offsets);
  v.index = blob + v.geometry.index;
  v.values = blob + v.geometry.values;
  return v;
}

void linear(const LinearCall& call) {
  const PackedView w = view_packed(call.packed, call.packed_bytes);
  const PackedHeader& h = w.header;
  require_match(h, call);
  const KernelTable& table = kernels();
  const std::uint8_t interleave = h.dtype == DType::bf16 ? table.bf16_interleave : 1;
  if (h.layout == Layout::tile && h.interleave != interleave) {
    throw std::invalid_argument(std::string("packed: was packed for another instruction set than '") + table.isa +
                                "'; unpack it there, pack it here");
  }
  if (call.batch == 0 || call.rows == 0) return;

  const Plan plan = choose_plan(table, h, call.batch, call.strategy);
  const int d = static_cast<int>(h.dtype);
  const LinearKernel& kernel = table.linear[static_cast<int>(plan.strategy)][d];

  static thread_local Buffer shared_panel;
  const std::int64_t kpad = w.geometry.kpad;
  const bool ready = is_panel(kernel, call, kpad);
  const void* panel = ready ? call.x : shared_panel.reserve(static_cast<std::size_t>(panel_bytes(kernel, call.batch, kpad)));

  const PanelJob pack{call.x, call.batch, call.cols, kpad, call.stride, plan.block, kernel.round, const_cast<void*>(panel)};
  const PanelFn pack_fn = table.panel[static_cast<int>(kernel.panel)][d];
  const LinearJob job{call.rows, call.cols,      kpad,     call.batch, plan.block, w.offsets,
                      w.index,   h.column_bytes, w.values, panel,      call.bias,  call.out};
  const std::int64_t units = ceil_div(call.rows, kernel.unit_rows);
  const std::int64_t pack_units = ready ? 0 : panel_units(kernel.panel, call.batch, kpad);
  const std::size_t scratch_bytes = kernel.scratch_bytes(job);
  const auto scratch = [scratch_bytes] {
    static thread_local Buffer buffer;
    return buffer.reserve(scratch_bytes);
  };

  const int threads = h.nnz * call.batch < kSerialProducts ? 1 : usable_threads(call.threads);
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
