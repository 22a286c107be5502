// How the kept values of a weight are stored. The dtype beside it is what the weight computes in: that of activations, bias
// and output.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace sparseprune {

// The numbers are part of the packed header, of `spec` on disk (sparseprune/weights/encoding.py) and of what Python passes
// along.
enum class Encoding : std::uint8_t {
  plain = 0,         // the dtype's own bits
  int8 = 1,          // code * scale, codes of 8 bits with a sign
  int4 = 2,          // (code - 8) * scale, codes of 4 bits
  int4_minimum = 3,  // code * scale + minimum
};
constexpr int kEncodings = 4;

static constexpr const char* encoding_name(Encoding encoding) {
  constexpr const char* names[kEncodings] = {"plain", "int8", "int4", "int4 with minimums"};
  return names[static_cast<int>(encoding)];
}

// Bits of a stored value.
static constexpr std::int64_t value_bits(Encoding encoding, DType dtype) {
  if (encoding == Encoding::plain) return 8 * static_cast<std::int64_t>(size_of(dtype));
  return encoding == Encoding::int8 ? 8 : 4;
}

static constexpr bool has_minimums(Encoding encoding) {
  return encoding == Encoding::int4_minimum;
}

// Whether every `group` columns of the dense weight share a scale of such a dtype; plain values have none: 0 and 0.
static constexpr bool has_scales(Encoding encoding, std::int64_t group, DType scales) {
  if (encoding == Encoding::plain) return group == 0 && scales == DType{};
  return (group == 32 || group == 64 || group == 128) && (scales == DType::bf16 || scales == DType::f16);
}

}  // namespace sparseprune
