// One registration a launcher: a device, a stream, addresses and shapes in; what CUDA has to say becomes a RuntimeError.
// Every call releases the GIL, because a launch waits where the card's queue is full. sparseprune/kernels/cuda.py is the
// only caller and keeps the tensors alive. Nothing here waits for the card.
#include "bindings/cuda.h"

#include <pybind11/stl.h>

#include <cstring>
#include <vector>

#include "bindings/arguments.h"
#include "cuda/device.h"
#include "cuda/launchers.h"

namespace py = pybind11;

namespace sparseprune {
namespace {

using i64 = std::int64_t;

// An address that becomes whichever pointer the launcher takes.
struct Pointer {
  Address address;
  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
};
Pointer at(Address address, i64 offset = 0) {
  return {address + static_cast<Address>(offset)};
}

template <typename Launch>
void run(const char* op, int device, const Launch& launch) {
  const cuda::DeviceGuard guard(device);
  cuda::check(launch(), op);
}

Layout to_cuda_layout(int code) {
  const auto layout = static_cast<Layout>(code);
  if (code < 0 || code >= kLayouts || !is_cuda(layout)) {
    throw std::invalid_argument("layout: must be 2 (sparse24) or 3 (bitmap8), got " + std::to_string(code));
  }
  return layout;
}

// Sums and products of such sides do not overflow.
bool is_sane(const Matrix& m) {
  constexpr i64 kMax = i64{1} << 40;
  return m.rows < kMax && m.cols < kMax && (m.cols == 0 || m.rows < kMax / m.cols);
}

// The card holds the header, so that the host can hold only the size against the shape.
Geometry require_geometry(const Matrix& m, Address blob, i64 size) {
  PackedHeader h;
  Geometry g;
  if (!is_sane(m) || !cuda_geometry(m, size, &h, &g)) {
    throw std::invalid_argument("packed: holds no weight of " + std::to_string(m.rows) + "x" + std::to_string(m.cols) + " " +
                                dtype_name(m.dtype) + " packed for CUDA (its size is " + std::to_string(size) +
                                " bytes); move the layer with .to(device), not its buffer alone");
  }
  if (blob % 16 != 0) {
    throw std::invalid_argument("packed: must begin at a multiple of 16 bytes, as ops.pack makes it; clone it");
  }
  return g;
}

PackedHeader make_header(const Matrix& m, Layout layout, i64 nnz, i64 stored) {
  PackedHeader h{};
  std::memcpy(h.magic, kMagic, 8);
  h.version = kPackedVersion;
  h.layout = layout;
  h.dtype = m.dtype;
  h.interleave = 1;
  h.rows = m.rows;
  h.cols = m.cols;
  h.nnz = nnz;
  h.stored = layout == Layout::sparse24 ? geometry_of(h).units * sparse24::kValues : stored;
  h.checksum = header_checksum(h);
  return h;
}

// `header`: the first 64 bytes of a blob, on the host; size: of the whole blob.
py::dict read_header(Address header, i64 size) {
  PackedHeader h;
  std::memcpy(&h, ptr<const void>(header), sizeof h);
  if (std::memcmp(h.magic, kMagic, 8) != 0 || h.version != kPackedVersion) {
    throw std::invalid_argument("packed: not a packed weight of version " + std::to_string(kPackedVersion) +
                                "; make packed weights with ops.pack");
  }
  if (h.checksum != header_checksum(h)) {
    throw std::invalid_argument("packed: the header is damaged; pack the weight again");
  }
  if (!is_cuda(h.layout)) {
    throw std::invalid_argument(
        "packed: holds a weight packed for the CPU; move the layer with .to(device), not its buffer alone");
  }
  const Matrix m{h.rows, h.cols, h.dtype};
  PackedHeader seen;
  Geometry g;
  const bool sane = static_cast<int>(h.dtype) < kDTypes && h.rows >= 0 && h.cols >= 0 && h.nnz >= 0 && is_sane(m);
  if (!sane || !cuda_geometry(m, size, &seen, &g) || h.stored < 0 || h.stored > seen.stored ||
      geometry_of(h).total != size) {
    throw std::invalid_argument("packed: the header does not fit the size of " + std::to_string(size) +
                                " bytes; the weight is damaged, pack it again");
  }
  py::dict d;
  d["layout"] = static_cast<int>(h.layout);
  d["dtype"] = static_cast<int>(h.dtype);
  d["rows"] = h.rows;
  d["cols"] = h.cols;
  d["nnz"] = h.nnz;
  return d;
}

void bind_masks(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def(
      "mask_bytes",
      [](int device, Address stream, Address in, Address mask, Address out, i64 n, int dtype) {
        run("mask_apply", device,
            [&] { return cuda::mask_bytes(to_dtype(dtype), at(in), at(mask), at(out), n, at(stream)); });
      },
      nogil);
  m.def(
      "mask_bits",
      [](int device, Address stream, Address in, Address bits, Address out, i64 rows, i64 cols, int dtype) {
        run("mask_apply_packed", device,
            [&] { return cuda::mask_bits(matrix(rows, cols, dtype), at(in), at(bits), at(out), at(stream)); });
      },
      nogil);
  m.def(
      "threshold",
      [](int device, Address stream, Address in, float limit, Address out, Address bits, i64 rows, i64 cols, int dtype) {
        run("threshold_mask_", device,
            [&] { return cuda::threshold(matrix(rows, cols, dtype), at(in), limit, at(out), at(bits), at(stream)); });
      },
      nogil);
  m.def(
      "bytes_to_bits",
      [](int device, Address stream, i64 rows, i64 cols, Address mask, Address bits) {
        run("pack_mask", device, [&] { return cuda::bytes_to_bits(rows, cols, at(mask), at(bits), at(stream)); });
      },
      nogil);
  m.def(
      "bits_to_bytes",
      [](int device, Address stream, i64 rows, i64 cols, Address bits, Address mask) {
        run("unpack_mask", device, [&] { return cuda::bits_to_bytes(rows, cols, at(bits), at(mask), at(stream)); });
      },
      nogil);
}

void bind_conversions(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def(
      "scan_dense",
      [](int device, Address stream, Address dense, i64 rows, i64 cols, int dtype, Address bits, Address counts) {
        run("scan_dense", device,
            [&] { return cuda::scan_dense(matrix(rows, cols, dtype), at(dense), at(bits), at(counts), at(stream)); });
      },
      nogil);
  m.def(
      "count_bits",
      [](int device, Address stream, i64 rows, i64 cols, Address bits, Address counts, Address error) {
        run("count_bits", device, [&] { return cuda::count_bits(rows, cols, at(bits), at(counts), at(error), at(stream)); });
      },
      nogil);
  m.def(
      "fill_groups",
      [](int device, Address stream, i64 rows, i64 cols, int n, int m_group, Address bits, Address error) {
        run("dense_to_nm", device,
            [&] { return cuda::fill_groups(rows, cols, n, m_group, at(bits), at(error), at(stream)); });
      },
      nogil);
  m.def(
      "compress_dense",
      [](int device, Address stream, Address dense, i64 rows, i64 cols, int dtype, Address bits, Address offsets,
         Address values) {
        run("compress_dense", device, [&] {
          return cuda::compress_dense(matrix(rows, cols, dtype), at(dense), at(bits), at(offsets), at(values), at(stream));
        });
      },
      nogil);
  m.def(
      "expand_dense",
      [](int device, Address stream, Address values, Address bits, Address offsets, Address dense, i64 rows, i64 cols,
         int dtype) {
        run("bitmap_to_dense", device, [&] {
          return cuda::expand_dense(matrix(rows, cols, dtype), at(values), at(bits), at(offsets), at(dense), at(stream));
        });
      },
      nogil);
  m.def(
      "dense_to_csr",
      [](int device, Address stream, Address dense, i64 rows, i64 cols, int dtype, Address crow, Address col,
         Address values) {
        run("dense_to_csr", device, [&] {
          return cuda::dense_to_csr(matrix(rows, cols, dtype), at(dense), at(crow), at(col), at(values), at(stream));
        });
      },
      nogil);
  m.def(
      "csr_to_dense",
      [](int device, Address stream, Address crow, Address col, i64 nnz, Address values, Address dense, i64 rows, i64 cols,
         int dtype, Address error) {
        run("csr_to_dense", device, [&] {
          return cuda::csr_to_dense(matrix(rows, cols, dtype), at(crow), at(col), nnz, at(values), at(dense), at(error),
                                    at(stream));
        });
      },
      nogil);
}

void bind_packing(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> nogil;
  // (units, offsets, index, values, total): how many units a blob has, where its sections begin, its size. sparse24 has
  // always as many values, whatever `stored` says.
  m.def("sections", [](i64 rows, i64 cols, int dtype, int layout, i64 stored) {
    const PackedHeader h = make_header(matrix(rows, cols, dtype), to_cuda_layout(layout), 0, stored);
    const Geometry g = geometry_of(h);
    return py::make_tuple(g.units, g.offsets, g.index, g.values, g.total);
  });
  m.def("header_bytes", [](i64 rows, i64 cols, int dtype, int layout, i64 nnz, i64 stored) {
    const PackedHeader h = make_header(matrix(rows, cols, dtype), to_cuda_layout(layout), nnz, stored);
    return py::bytes(reinterpret_cast<const char*>(&h), sizeof h);
  });
  m.def("header", &read_header);
  m.def(
      "sparse24_pack",
      [](int device, Address stream, Address dense, Address bits, i64 rows, i64 cols, int dtype, Address blob,
         i64 blob_bytes, Address error) {
        const Matrix shape = matrix(rows, cols, dtype);
        const Geometry g = require_geometry(shape, blob, blob_bytes);
        run("pack", device, [&] {
          return cuda::sparse24_pack(shape, at(dense), at(bits), at(blob, g.values), at(blob, g.index), at(error),
                                     at(stream));
        });
      },
      nogil);
  m.def(
      "sparse24_unpack",
      [](int device, Address stream, Address blob, i64 blob_bytes, i64 rows, i64 cols, int dtype, Address dense,
         Address bits) {
        const Matrix shape = matrix(rows, cols, dtype);
        const Geometry g = require_geometry(shape, blob, blob_bytes);
        run("unpack", device, [&] {
          return cuda::sparse24_unpack(shape, at(blob, g.values), at(blob, g.index), at(dense), at(bits), at(stream));
        });
      },
      nogil);
  m.def(
      "bitmap8_index",
      [](int device, Address stream, i64 rows, i64 cols, Address bits, Address index, Address counts) {
        run("pack", device, [&] { return cuda::bitmap8_index(rows, cols, at(bits), at(index), at(counts), at(stream)); });
      },
      nogil);
  // The blob's offsets and bitmaps are in it already.
  m.def(
      "bitmap8_pack",
      [](int device, Address stream, Address dense, i64 rows, i64 cols, int dtype, Address blob, i64 blob_bytes) {
        const Matrix shape = matrix(rows, cols, dtype);
        const Geometry g = require_geometry(shape, blob, blob_bytes);
        run("pack", device, [&] {
          return cuda::bitmap8_pack(shape, at(dense), at(blob, g.index), at(blob, g.offsets), at(blob, g.values),
                                    at(stream));
        });
      },
      nogil);
  m.def(
      "bitmap8_unpack",
      [](int device, Address stream, Address blob, i64 blob_bytes, i64 rows, i64 cols, int dtype, Address dense,
         Address bits) {
        const Matrix shape = matrix(rows, cols, dtype);
        const Geometry g = require_geometry(shape, blob, blob_bytes);
        run("unpack", device, [&] {
          const i64 stored = (blob_bytes - blob_bytes % kAlign - g.values) / static_cast<i64>(size_of(shape.dtype));
          return cuda::bitmap8_unpack(shape, at(blob, g.index), at(blob, g.offsets), at(blob, g.values), stored, at(dense),
                                      at(bits), at(stream));
        });
      },
      nogil);
}

void linear(int device, Address stream, Address packed, i64 packed_bytes, Address x, i64 batch, i64 cols, i64 stride,
            Address bias, Address out, i64 rows, int dtype, int config, int splits, Address workspace, i64 workspace_bytes) {
  const Matrix m = matrix(rows, cols, dtype);
  const Geometry g = require_geometry(m, packed, packed_bytes);
  const auto layout = layout_of_size(packed_bytes);
  const int configs = cuda::linear_configs(layout, m.dtype);
  if (config < 0 || config >= configs) {
    throw std::invalid_argument("config: must be in [0, " + std::to_string(configs) + "), got " + std::to_string(config));
  }
  const i64 blocks = g.kpad / (layout == Layout::sparse24 ? sparse24::kCols : bitmap8::kCols);
  if (splits < 1 || splits > blocks) {
    throw std::invalid_argument("splits: must be in [1, " + std::to_string(blocks) + "] for " + std::to_string(cols) +
                                " columns, got " + std::to_string(splits));
  }
  const i64 partial = batch * rows * 4;
  if (batch < 0 || (splits > 1 && workspace_bytes < splits * partial) || (splits > 1 && partial > 0 && workspace == 0)) {
    throw std::invalid_argument("workspace: must hold " + std::to_string(splits) + " times the output in float32, " +
                                std::to_string(splits * partial) + " bytes, got " + std::to_string(workspace_bytes));
  }
  run("linear", device, [&] {
    return cuda::linear({layout,
                         m.dtype,
                         rows,
                         cols,
                         batch,
                         at(packed),
                         packed_bytes,
                         at(x),
                         stride,
                         at(bias),
                         at(out),
                         at(workspace),
                         {config, splits, workspace_bytes},
                         at(stream)});
  });
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("missing", &cuda::missing);
  m.def("sm_count", &cuda::sm_count);
  bind_masks(m);
  bind_conversions(m);
  bind_packing(m);
  // (config, splits, bytes of workspace)
  m.def("plan", [](int device, int layout, int dtype, i64 rows, i64 cols, i64 batch) {
    const cuda::LinearPlan p =
        cuda::plan_linear(to_cuda_layout(layout), to_dtype(dtype), rows, cols, batch, cuda::sm_count(device));
    return py::make_tuple(p.config, p.splits, p.workspace_bytes);
  });
  // The configurations' names; each serves any shape.
  m.def("configs", [](int layout, int dtype) {
    std::vector<std::string> names;
    const int count = cuda::linear_configs(to_cuda_layout(layout), to_dtype(dtype));
    for (int i = 0; i < count; ++i) names.emplace_back(cuda::linear_config_name(to_cuda_layout(layout), to_dtype(dtype), i));
    return names;
  });
  m.def("linear", &linear, py::call_guard<py::gil_scoped_release>());
}

}  // namespace sparseprune
