// Tensors as arguments, where the time of a call counts: read and made by DLPack's C exchange (dlpack.h 1.3), a table of
// functions that torch 2.10 and newer carry on torch.Tensor. No libtorch: it is an ABI of its own, and this is our side of it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace sparseprune {

// Whether torch has the table; called once, when the package is imported, with torch.Tensor, torch.nn.Parameter, torch.empty,
// and the torch.dtype of each DType.
bool use_tensors(pybind11::type tensor, pybind11::type parameter, pybind11::object empty, pybind11::list dtypes);

// x [..., cols] times the weight, transposed, plus bias: a new tensor [..., rows]. None, with nothing done, for arguments that
// are not plain: other types than torch.Tensor itself (or torch.nn.Parameter, of a bias), another device than the CPU, another
// dtype or width than the packing's, strides; whoever calls then finds out what is wrong with them, if anything is.
pybind11::object linear_of_tensors(pybind11::handle x, pybind11::handle packed, pybind11::handle bias, std::int64_t rows,
                                   std::int64_t cols, std::int64_t packing, int threads);

}  // namespace sparseprune
