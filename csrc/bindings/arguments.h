// What the bindings do to every argument: addresses become pointers. What numbers mean is checked in csrc/core.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "core/header.h"

namespace sparseprune {

using Address = std::uintptr_t;

template <typename T>
T* ptr(Address a) {
  return reinterpret_cast<T*>(a);
}

// The header of a blob of `size` bytes, of which `begin` shows the first 64: it must hold what the caller says.
inline pybind11::dict header(Home home, Address begin, std::int64_t size, std::int64_t rows, std::int64_t cols,
                             std::int64_t packing) {
  const PackedHeader h = read_header(home, ptr<const void>(begin), size);
  require_same(h, rows, cols, to_packing(packing));
  pybind11::dict d;
  d["packing"] = to_code(packing_of(h));
  d["interleave"] = static_cast<int>(h.interleave);
  d["rows"] = h.rows;
  d["cols"] = h.cols;
  d["nnz"] = h.nnz;
  return d;
}

}  // namespace sparseprune
