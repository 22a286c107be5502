// The extension module: addresses, shapes and strides in, nothing of torch but what tensors.h reads. One registration an
// operation; what takes time releases the GIL. sparseprune/kernels/native.py is the only caller and keeps the tensors alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/arguments.h"
#include "bindings/tensors.h"
#include "cpu/dispatch/isa.h"
#include "cpu/ops/convert.h"
#include "cpu/ops/linear.h"
#include "cpu/ops/lookup.h"
#include "cpu/ops/pack.h"
#include "cpu/ops/rounding.h"
#if defined(SPARSEPRUNE_CUDA)
#include "bindings/cuda.h"
#endif

namespace py = pybind11;
using namespace sparseprune;

PYBIND11_MODULE(_core, m) {
  const py::call_guard<py::gil_scoped_release> nogil;

  m.def("isa", [] { return std::string(kernels().isa); });
  m.def("set_isa", &set_isa);
  m.def("isas_built", &isas_built);
  m.def("isas_available", &isas_available);

  m.def(
      "linear",
      [](Address packed, std::int64_t packed_bytes, std::int64_t rows, std::int64_t cols, std::int64_t packing, Address x,
         std::int64_t batch, std::int64_t stride, Address bias, Address out, int threads, int strategy) {
        linear({ptr<const std::uint8_t>(packed), packed_bytes, rows, cols, to_packing(packing), ptr<const void>(x), batch,
                stride, ptr<const void>(bias), ptr<void>(out), threads, strategy});
      },
      nogil);
  m.def("use_tensors", &use_tensors);
  m.def("linear_of_tensors", &linear_of_tensors);
  m.def(
      "lookup",
      [](Address packed, std::int64_t packed_bytes, std::int64_t rows, std::int64_t cols, std::int64_t packing,
         Address indices, int index_bytes, std::int64_t count, Address out, int threads) {
        lookup({ptr<const std::uint8_t>(packed), packed_bytes, rows, cols, to_packing(packing), ptr<const void>(indices),
                index_bytes, count, ptr<void>(out), threads});
      },
      nogil);
  // dtype: -1 for the codes, int8.
  m.def(
      "round_weight",
      [](Address weight, std::int64_t rows, std::int64_t cols, std::int64_t group, Address scales, Address minimums,
         Address kept, float zero, float least, float largest, int dtype, Address out, int threads) {
        const RoundCall call{ptr<const float>(weight),
                             rows,
                             cols,
                             group,
                             ptr<const float>(scales),
                             ptr<const float>(minimums),
                             ptr<const std::uint8_t>(kept),
                             zero,
                             least,
                             largest,
                             threads};
        if (dtype < 0) return round_to_codes(call, ptr<std::int8_t>(out));
        round_to_values(call, to_dtype(dtype), ptr<void>(out));
      },
      nogil);
  m.def(
      "round_gradients",
      [](Address weight, std::int64_t rows, std::int64_t cols, std::int64_t group, Address scales, Address minimums,
         Address kept, float zero, float least, float largest, int dtype, Address gradient, Address of_weight,
         Address of_scales, Address of_minimums, int threads) {
        const RoundCall call{ptr<const float>(weight),
                             rows,
                             cols,
                             group,
                             ptr<const float>(scales),
                             ptr<const float>(minimums),
                             ptr<const std::uint8_t>(kept),
                             zero,
                             least,
                             largest,
                             threads};
        round_gradients(call, to_dtype(dtype), ptr<const void>(gradient), ptr<float>(of_weight), ptr<float>(of_scales),
                        ptr<float>(of_minimums));
      },
      nogil);
  m.def("strategy", [](Address packed, std::int64_t packed_bytes, std::int64_t batch) {
    const PackedView v = view_packed(ptr<const std::uint8_t>(packed), packed_bytes);
    return std::string(strategy_name(choose_plan(kernels(), v.header, batch).strategy));
  });
  m.def("header", [](Address packed, std::int64_t packed_bytes, std::int64_t rows, std::int64_t cols, std::int64_t packing) {
    return header(Home::cpu, packed, packed_bytes, rows, cols, packing);
  });

  m.def(
      "scan_dense",
      [](Address dense, std::int64_t rows, std::int64_t cols, int dtype, Address bits, Address offsets, int threads) {
        return scan_dense(to_matrix(rows, cols, dtype), ptr<const void>(dense), ptr<std::uint8_t>(bits),
                          ptr<std::int64_t>(offsets), threads);
      },
      nogil);
  m.def(
      "count_dense",
      [](Address dense, std::int64_t rows, std::int64_t cols, int dtype, Address offsets, int threads) {
        return count_dense(to_matrix(rows, cols, dtype), ptr<const void>(dense), ptr<std::int64_t>(offsets), threads);
      },
      nogil);
  // None, or (row, group, kept) of the first group that holds more than n.
  m.def("fill_groups",
        [](std::int64_t rows, std::int64_t cols, int n, int m_group, Address bits, int threads) -> py::object {
          GroupError error{};
          bool ok;
          {
            const py::gil_scoped_release release;
            ok = fill_groups(rows, cols, n, m_group, ptr<std::uint8_t>(bits), &error, threads);
          }
          if (ok) return py::none();
          return py::make_tuple(error.row, error.group, error.kept);
        });
  m.def(
      "count_bits",
      [](std::int64_t rows, std::int64_t cols, Address bits, Address offsets, int threads) {
        return count_bits(rows, cols, ptr<const std::uint8_t>(bits), ptr<std::int64_t>(offsets), threads);
      },
      nogil);
  m.def(
      "compress_dense",
      [](Address dense, std::int64_t rows, std::int64_t cols, int dtype, Address bits, Address offsets, Address values,
         int threads) {
        compress_dense(to_matrix(rows, cols, dtype), ptr<const void>(dense), ptr<const std::uint8_t>(bits),
                       ptr<const std::int64_t>(offsets), ptr<void>(values), threads);
      },
      nogil);
  m.def(
      "expand_dense",
      [](Address values, Address bits, Address offsets, Address dense, std::int64_t rows, std::int64_t cols, int dtype,
         int threads) {
        expand_dense(to_matrix(rows, cols, dtype), ptr<const void>(values), ptr<const std::uint8_t>(bits),
                     ptr<const std::int64_t>(offsets), ptr<void>(dense), threads);
      },
      nogil);
  m.def(
      "dense_to_csr",
      [](Address dense, std::int64_t rows, std::int64_t cols, int dtype, Address crow, Address col, Address values,
         int threads) {
        dense_to_csr(to_matrix(rows, cols, dtype), ptr<const void>(dense), ptr<const std::int64_t>(crow),
                     ptr<std::int32_t>(col), ptr<void>(values), threads);
      },
      nogil);
  m.def(
      "csr_to_dense",
      [](Address crow, Address col, std::int64_t nnz, Address values, Address dense, std::int64_t rows, std::int64_t cols,
         int dtype, int threads) {
        csr_to_dense(to_matrix(rows, cols, dtype), ptr<const std::int64_t>(crow), ptr<const std::int32_t>(col), nnz,
                     ptr<const void>(values), ptr<void>(dense), threads);
      },
      nogil);
  m.def("packed_bytes", [](std::int64_t rows, std::int64_t cols, std::int64_t packing, std::int64_t nnz, Address bits) {
    return packed_bytes(rows, cols, to_packing(packing), nnz, ptr<const std::uint8_t>(bits));
  });
  m.def(
      "pack",
      [](Address values, Address bits, Address offsets, Address scales, Address minimums, Address blob, std::int64_t rows,
         std::int64_t cols, std::int64_t packing, int threads) {
        pack(rows, cols, to_packing(packing),
             {ptr<const void>(values), ptr<const std::uint8_t>(bits), ptr<const std::int64_t>(offsets),
              ptr<const std::uint16_t>(scales), ptr<const std::uint16_t>(minimums)},
             ptr<std::uint8_t>(blob), threads);
      },
      nogil);
  m.def(
      "unpack_bits",
      [](Address blob, std::int64_t size, Address bits, int threads) {
        unpack_bits(ptr<const std::uint8_t>(blob), size, ptr<std::uint8_t>(bits), threads);
      },
      nogil);
  m.def(
      "unpack_values",
      [](Address blob, std::int64_t size, Address offsets, Address values, int threads) {
        unpack_values(ptr<const std::uint8_t>(blob), size, ptr<const std::int64_t>(offsets), ptr<void>(values), threads);
      },
      nogil);
  m.def(
      "unpack_scales",
      [](Address blob, std::int64_t size, Address scales, Address minimums, int threads) {
        unpack_scales(ptr<const std::uint8_t>(blob), size, ptr<std::uint16_t>(scales), ptr<std::uint16_t>(minimums),
                      threads);
      },
      nogil);
  m.def(
      "mask_bytes",
      [](Address in, Address mask, Address out, std::int64_t n, int dtype, int threads) {
        mask_bytes(to_dtype(dtype), ptr<const void>(in), ptr<const std::uint8_t>(mask), ptr<void>(out), n, threads);
      },
      nogil);
  m.def(
      "mask_bits",
      [](Address in, Address bits, Address out, std::int64_t rows, std::int64_t cols, int dtype, int threads) {
        mask_bits(to_matrix(rows, cols, dtype), ptr<const void>(in), ptr<const std::uint8_t>(bits), ptr<void>(out), threads);
      },
      nogil);
  m.def(
      "threshold",
      [](Address in, float limit, Address out, Address bits, std::int64_t rows, std::int64_t cols, int dtype, int threads) {
        threshold(to_matrix(rows, cols, dtype), ptr<const void>(in), limit, ptr<void>(out), ptr<std::uint8_t>(bits),
                  threads);
      },
      nogil);
  m.def(
      "bytes_to_bits",
      [](std::int64_t rows, std::int64_t cols, Address mask, Address bits, int threads) {
        bytes_to_bits(rows, cols, ptr<const std::uint8_t>(mask), ptr<std::uint8_t>(bits), threads);
      },
      nogil);
  m.def(
      "bits_to_bytes",
      [](std::int64_t rows, std::int64_t cols, Address bits, Address mask, int threads) {
        bits_to_bytes(rows, cols, ptr<const std::uint8_t>(bits), ptr<std::uint8_t>(mask), threads);
      },
      nogil);

#if defined(SPARSEPRUNE_CUDA)
  py::module_ cuda = m.def_submodule("cuda");
  cuda.attr("toolkit") = SPARSEPRUNE_CUDA_TOOLKIT;
  cuda.attr("targets") = SPARSEPRUNE_CUDA_TARGETS;
  bind_cuda(cuda);
#endif
}
