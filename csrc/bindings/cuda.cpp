// One registration a launcher: a device, a stream, addresses and shapes in; what CUDA has to say becomes a RuntimeError.
// Every call releases the GIL, because a launch waits where the card's queue is full. sparseprune/kernels/cuda.py is the
// only caller and keeps the tensors alive. Nothing here waits for the card.
#include "bindings/cuda.h"

#include <pybind11/stl.h>

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
            [&] { return cuda::mask_bits(to_matrix(rows, cols, dtype), at(in), at(bits), at(out), at(stream)); });
      },
      nogil);
  m.def(
      "threshold",
      [](int device, Address stream, Address in, float limit, Address out, Address bits, i64 rows, i64 cols, int dtype) {
        run("threshold_mask_", device,
            [&] { return cuda::threshold(to_matrix(rows, cols, dtype), at(in), limit, at(out), at(bits), at(stream)); });
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
            [&] { return cuda::scan_dense(to_matrix(rows, cols, dtype), at(dense), at(bits), at(counts), at(stream)); });
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
          return cuda::compress_dense(to_matrix(rows, cols, dtype), at(dense), at(bits), at(offsets), at(values),
                                      at(stream));
        });
      },
      nogil);
  m.def(
      "expand_dense",
      [](int device, Address stream, Address values, Address bits, Address offsets, Address dense, i64 rows, i64 cols,
         int dtype) {
        run("bitmap_to_dense", device, [&] {
          return cuda::expand_dense(to_matrix(rows, cols, dtype), at(values), at(bits), at(offsets), at(dense), at(stream));
        });
      },
      nogil);
  m.def(
      "dense_to_csr",
      [](int device, Address stream, Address dense, i64 rows, i64 cols, int dtype, Address crow, Address col,
         Address values) {
        run("dense_to_csr", device, [&] {
          return cuda::dense_to_csr(to_matrix(rows, cols, dtype), at(dense), at(crow), at(col), at(values), at(stream));
        });
      },
      nogil);
  m.def(
      "csr_to_dense",
      [](int device, Address stream, Address crow, Address col, i64 nnz, Address values, Address dense, i64 rows, i64 cols,
         int dtype, Address error) {
        run("csr_to_dense", device, [&] {
          return cuda::csr_to_dense(to_matrix(rows, cols, dtype), at(crow), at(col), nnz, at(values), at(dense), at(error),
                                    at(stream));
        });
      },
      nogil);
}

void bind_packing(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> nogil;
  // (units, offsets, index, values, total): how many units a blob has, where its sections begin, its size. sparse24 has
  // always as many values, whatever `stored` says.
  m.def("sections", [](i64 rows, i64 cols, i64 packing, i64 stored) {
    const Geometry g = geometry_of(make_header(Home::cuda, rows, cols, to_packing(packing), 0, stored));
    return py::make_tuple(g.units, g.offsets, g.index, g.values, g.total);
  });
  m.def("header_bytes", [](i64 rows, i64 cols, i64 packing, i64 nnz, i64 stored) {
    const PackedHeader h = make_header(Home::cuda, rows, cols, to_packing(packing), nnz, stored);
    return py::bytes(reinterpret_cast<const char*>(&h), sizeof h);
  });
  // `begin`: the first 64 bytes of a blob, on the host; size: of the whole blob.
  m.def("header", [](Address begin, i64 size, i64 rows, i64 cols, i64 packing) {
    return header(Home::cuda, begin, size, rows, cols, packing);
  });
  m.def(
      "sparse24_pack",
      [](int device, Address stream, Address dense, Address bits, i64 rows, i64 cols, i64 packing, Address blob,
         i64 blob_bytes, Address error) {
        const Packing p = to_packing(packing);
        const Matrix shape{rows, cols, p.dtype};
        const Geometry g = require_hidden(rows, cols, p, blob, blob_bytes).geometry;
        run("pack", device, [&] {
          return cuda::sparse24_pack(shape, at(dense), at(bits), at(blob, g.values), at(blob, g.index), at(error),
                                     at(stream));
        });
      },
      nogil);
  m.def(
      "sparse24_unpack",
      [](int device, Address stream, Address blob, i64 blob_bytes, i64 rows, i64 cols, i64 packing, Address dense,
         Address bits) {
        const Packing p = to_packing(packing);
        const Matrix shape{rows, cols, p.dtype};
        const Geometry g = require_hidden(rows, cols, p, blob, blob_bytes).geometry;
        run("unpack", device, [&] {
          return cuda::sparse24_unpack(shape, at(blob, g.values), at(blob, g.index), at(dense), at(bits), at(stream));
        });
      },
      nogil);
  m.def(
      "fragments_pack",
      [](int device, Address stream, Address codes, Address mask, Address scales, Address minimums, i64 rows, i64 cols,
         i64 packing, Address blob, i64 blob_bytes) {
        const Packing p = to_packing(packing);
        const Geometry g = require_hidden(rows, cols, p, blob, blob_bytes).geometry;
        run("pack", device, [&] {
          return cuda::fragments_pack(p, rows, cols, at(codes), at(mask), at(scales), at(minimums), at(blob, g.values),
                                      at(stream));
        });
      },
      nogil);
  m.def(
      "fragments_unpack",
      [](int device, Address stream, Address blob, i64 blob_bytes, i64 rows, i64 cols, i64 packing, Address codes,
         Address mask, Address scales, Address minimums) {
        const Packing p = to_packing(packing);
        const Geometry g = require_hidden(rows, cols, p, blob, blob_bytes).geometry;
        run("unpack", device, [&] {
          return cuda::fragments_unpack(p, rows, cols, at(blob, g.values), at(codes), at(mask), at(scales), at(minimums),
                                        at(stream));
        });
      },
      nogil);
  m.def(
      "fragments_lookup",
      [](int device, Address stream, Address blob, i64 blob_bytes, i64 rows, i64 cols, i64 packing, Address indices,
         i64 count, Address out) {
        const Packing p = to_packing(packing);
        const Geometry g = require_hidden(rows, cols, p, blob, blob_bytes).geometry;
        run("lookup", device, [&] {
          return cuda::fragments_lookup(p, rows, cols, at(blob, g.values), at(indices), count, at(out), at(stream));
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
      [](int device, Address stream, Address dense, i64 rows, i64 cols, i64 packing, Address blob, i64 blob_bytes) {
        const Packing p = to_packing(packing);
        const Matrix shape{rows, cols, p.dtype};
        const Geometry g = require_hidden(rows, cols, p, blob, blob_bytes).geometry;
        run("pack", device, [&] {
          return cuda::bitmap8_pack(shape, at(dense), at(blob, g.index), at(blob, g.offsets), at(blob, g.values),
                                    at(stream));
        });
      },
      nogil);
  m.def(
      "bitmap8_unpack",
      [](int device, Address stream, Address blob, i64 blob_bytes, i64 rows, i64 cols, i64 packing, Address dense,
         Address bits) {
        const Packing p = to_packing(packing);
        const Matrix shape{rows, cols, p.dtype};
        const auto [g, stored] = require_hidden(rows, cols, p, blob, blob_bytes);
        run("unpack", device, [&, &g = g, &stored = stored] {
          return cuda::bitmap8_unpack(shape, at(blob, g.index), at(blob, g.offsets), at(blob, g.values), stored, at(dense),
                                      at(bits), at(stream));
        });
      },
      nogil);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("missing", &cuda::missing);
  m.def("sm_count", &cuda::sm_count);
  bind_masks(m);
  bind_conversions(m);
  bind_packing(m);
  // (config, splits, bytes of workspace)
  m.def("plan", [](int device, i64 packing, i64 rows, i64 cols, i64 batch) {
    const cuda::LinearPlan p = cuda::plan_linear(to_packing(packing), rows, cols, batch, cuda::sm_count(device));
    return py::make_tuple(p.config, p.splits, p.workspace_bytes);
  });
  // The configurations' names; each serves any shape.
  m.def("configs", [](i64 packing) {
    const Packing p = to_packing(packing);
    std::vector<std::string> names;
    for (int i = 0; i < cuda::linear_configs(p); ++i) names.emplace_back(cuda::linear_config_name(p, i));
    return names;
  });
  m.def(
      "linear",
      [](int device, Address stream, Address packed, i64 packed_bytes, i64 rows, i64 cols, i64 packing, Address x, i64 batch,
         i64 stride, Address bias, Address out, int config, int splits, Address workspace, i64 workspace_bytes) {
        run("linear", device, [&] {
          return cuda::linear({to_packing(packing),
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
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace sparseprune
