// Plain C++: a token asks for one row, in few microseconds, and a prompt's rows are shared out among the threads.
//
// A product of a code and a scale is exact in float32, so it makes no difference whether a compiler fuses the addition.
#include "cpu/ops/lookup.h"

#include <stdexcept>
#include <string>

#include "core/header.h"
#include "core/layouts/quads.h"
#include "cpu/ops/pack.h"
#include "cpu/ops/parallel.h"
#include "cpu/scalar/vec.h"

namespace sparseprune {
namespace {

constexpr std::int64_t kSerial = 1 << 14;  // numbers below which waking threads costs more than they save: a guess

std::int64_t index_at(const LookupCall& call, std::int64_t i) {
  return call.index_bytes == 8 ? static_cast<const std::int64_t*>(call.indices)[i]
                               : static_cast<const std::int32_t*>(call.indices)[i];
}

void require_rows(const LookupCall& call) {
  for (std::int64_t i = 0; i < call.count; ++i) {
    const std::int64_t index = index_at(call, i);
    if (index >= 0 && index < call.rows) continue;
    throw std::out_of_range("indices: must be at least 0 and below " + std::to_string(call.rows) +
                            ", the rows of the weight, got " + std::to_string(index) + " at position " + std::to_string(i) +
                            "; check that the tokenizer is this model's");
  }
}

// What codes of this encoding stand for beside scale and minimum: an int8 lies in the blob as code + 128.
int zero_of(Encoding encoding) {
  return encoding == Encoding::int8 ? 128 : encoding == Encoding::int4 ? 8 : 0;
}

// One row as numbers. scales, minimums: of its tile, at its lane; the next group's lie kRows on.
template <typename T, typename S>
void read_row(const PackedHeader& h, const std::uint8_t* tile, int row, const S* scales, const S* minimums, T* out) {
  const int bits = static_cast<int>(value_bits(h.encoding, h.dtype)), mask = bits == 8 ? 255 : 15;
  const int zero = zero_of(h.encoding);
  for (std::int64_t begin = 0; begin < h.cols; begin += h.group) {
    const std::int64_t g = begin / h.group * codes::kRows, end = begin + h.group < h.cols ? begin + h.group : h.cols;
    const float scale = scalar::to_float(scales[g]), minimum = minimums ? scalar::to_float(minimums[g]) : 0.0f;
    for (std::int64_t k = begin; k < end; ++k) {
      const int code = (tile[quads::byte_of(bits, row, k)] >> quads::shift_of(bits, k) & mask) - zero;
      const float number = static_cast<float>(code) * scale;
      scalar::from_float(minimums ? number + minimum : number, out + k);
    }
  }
}

template <typename T, typename S>
void read_rows(const LookupCall& call, const PackedView& w) {
  const PackedHeader& h = w.header;
  const auto* values = static_cast<const std::uint8_t*>(w.values);
  const std::int64_t tile_bytes = quads::tile_bytes(static_cast<int>(value_bits(h.encoding, h.dtype)), w.geometry.kpad);
  const std::int64_t groups = codes::groups(w.geometry.kpad, call.packing);
  const auto section = [&](std::int64_t offset, std::int64_t tile, int row) {
    return reinterpret_cast<const S*>(call.packed + offset) + tile * groups * codes::kRows + row;
  };
  parallel_for(call.count, call.count * call.cols < kSerial ? 1 : call.threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t index = index_at(call, i), tile = index / codes::kRows;
      const int row = static_cast<int>(index % codes::kRows);
      read_row(h, values + tile * tile_bytes, row, section(w.geometry.scales, tile, row),
               w.geometry.minimums ? section(w.geometry.minimums, tile, row) : nullptr,
               static_cast<T*>(call.out) + i * call.cols);
    }
  });
}

template <typename T>
void read_rows(const LookupCall& call, const PackedView& w) {
  if (call.packing.scales == DType::bf16) return read_rows<T, bf16>(call, w);
  read_rows<T, f16>(call, w);
}

}  // namespace

void lookup(const LookupCall& call) {
  const PackedView w = view_packed(call.packed, call.packed_bytes);
  require_same(w.header, call.rows, call.cols, call.packing);
  if (w.header.layout != Layout::quads) {
    throw std::invalid_argument("packed: must hold a dense weight in int8 or int4 (layout quads) to be looked up, got " +
                                describe(call.packing));
  }
  require_rows(call);
  switch (call.packing.dtype) {
    case DType::f32: return read_rows<float>(call, w);
    case DType::bf16: return read_rows<bf16>(call, w);
    case DType::f16: return read_rows<f16>(call, w);
  }
}

}  // namespace sparseprune
