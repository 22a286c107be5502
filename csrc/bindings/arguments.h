// What the bindings do to every argument: addresses to pointers, codes to types.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/packed.h"

namespace sparseprune {

using Address = std::uintptr_t;

template <typename T>
T* ptr(Address a) {
  return reinterpret_cast<T*>(a);
}

inline DType to_dtype(int code) {
  if (code < 0 || code >= kDTypes) throw std::invalid_argument("dtype: must be 0, 1 or 2, got " + std::to_string(code));
  return static_cast<DType>(code);
}

inline Matrix matrix(std::int64_t rows, std::int64_t cols, int dtype) {
  if (rows < 0 || cols < 0) throw std::invalid_argument("shape: must not be negative");
  return {rows, cols, to_dtype(dtype)};
}

}  // namespace sparseprune
