// How the kept values of a weight are stored. The dtype beside it is what the weight computes in: that of activations, bias
// and output.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace sparseprune {

// The numbers are part of the packed header, of `spec` on disk (sparseprune/weights/encoding.py) and of what Python passes
// along.
enum class Encoding : std::uint8_t {
  plain = 0  // the dtype's own bits
};
constexpr int kEncodings = 1;

static constexpr const char* encoding_name(Encoding encoding) {
  switch (encoding) {
    case Encoding::plain: return "plain";
  }
  return "unknown";
}

// Bits of a stored value.
static constexpr std::int64_t value_bits(Encoding encoding, DType dtype) {
  switch (encoding) {
    case Encoding::plain: return 8 * static_cast<std::int64_t>(size_of(dtype));
  }
  return 0;
}

// Whether values so encoded may share what is stored beside them (scales) among every `group` columns of the dense weight;
// 0: they share nothing.
static constexpr bool has_group(Encoding encoding, std::int64_t group) {
  switch (encoding) {
    case Encoding::plain: return group == 0;
  }
  return false;
}

}  // namespace sparseprune
