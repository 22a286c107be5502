// Value types of weights and activations. Plain storage only: conversions live with each instruction set, because
// an inline function compiled under two sets of flags is merged by the linker, perhaps to the copy a CPU lacks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparseprune {

struct bf16 {
  std::uint16_t bits;
};

struct f16 {
  std::uint16_t bits;
};

// The numbers are part of the packed header and of what Python passes along.
enum class DType : std::uint8_t { f32 = 0, bf16 = 1, f16 = 2 };
constexpr int kDTypes = 3;

static constexpr std::size_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

static constexpr const char* dtype_name(DType dtype) {
  return dtype == DType::f32 ? "float32" : dtype == DType::bf16 ? "bfloat16" : "float16";
}

template <typename T>
struct dtype_of;
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct dtype_of<bf16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct dtype_of<f16> {
  static constexpr DType value = DType::f16;
};

// A matrix in memory, row-major and contiguous.
struct Matrix {
  std::int64_t rows, cols;
  DType dtype;
};

}  // namespace sparseprune
