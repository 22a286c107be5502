// The functions of csrc/cuda for Python: in the extension, the submodule `cuda`; in the tests, the emulator's module.
#pragma once

#include <pybind11/pybind11.h>

namespace sparseprune {

void bind_cuda(pybind11::module_& m);

}  // namespace sparseprune
