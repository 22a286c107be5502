// Masks over dense words: out = x where the mask keeps it, else +0.0.
//
// Layouts   x, out [rows, cols] row-major; mask bytes [rows, cols], any non-zero keeps; bits [rows, ceil(cols / 8)].
// Needs     nothing of shape or alignment; out may be x (a warp reads its span before it writes it).
// Partition a warp a span of 4 pieces (words.cuh) of a row:  row | span 0 | span 1 | ...   Where cols % 8 == 0 no two rows
//           share a byte of the bits, and the matrix is one long row: no ends, no short rows.
// Constants 4 pieces: 64 bytes a lane under way, which with a quarter of an SM's threads is twice what the latency of HBM3
//           needs (3.3 TB/s x some 700 ns / 132 SMs = 18 KB an SM). Blocks are not persistent: spans are equal and there
//           is nothing to keep.
#include <cstring>

#include "cuda/words.cuh"

namespace sparseprune::cuda {
namespace {

constexpr int kPieces = 4;

struct Spans {
  std::int64_t rows, cols, stride;  // stride: bytes of a row of bits
  std::int64_t per_row;
};

// Bit i: byte i is not zero.
SP_DEVICE unsigned bytes_set(std::uint32_t w) {
  w |= w >> 4;
  w |= w >> 2;
  w |= w >> 1;
  return (w & 0x01010101u) * 0x10204080u >> 28;  // bits 0, 8, 16, 24 to 28, 29, 30, 31; no two terms meet
}
// Byte i: bit i.
SP_DEVICE std::uint32_t spread_bits(unsigned nibble) {
  return nibble * 0x00204081u & 0x01010101u;
}

// An operation says how wide its pieces are, which rows are aligned, and what becomes of `pieces` of them from element `at`
// of a row on: all whole and aligned, or one of any kind, by way of `stage`. Loads come first, to be under way together.

template <typename W>
struct MaskBytes {
  static constexpr int kWidth = kPiece<W>;
  using Bytes = std::conditional_t<kLane<W> == 8, u32x2, std::uint32_t>;
  Global<const W> in;
  Global<const std::uint8_t> mask;
  Global<W> out;
  int in_shift, mask_shift, out_shift;

  SP_DEVICE bool aligned(const Spans&, std::int64_t) const {
    return in_shift == 0 && out_shift == 0 && is_aligned(mask_shift, 0, kLane<W>);
  }

  template <int pieces, bool whole>
  SP_DEVICE void run(const Spans& spans, std::int64_t, std::int64_t at, Shared<std::uint8_t> stage) const {
    const Shared<W> words = reinterpret<W>(stage);
    u32x4 v[pieces];
    Bytes m[pieces];
    SP_UNROLL
    for (int i = 0; i < pieces; ++i) {
      const std::int64_t from = at + i * kWidth;
      if constexpr (whole) {
        v[i] = load_whole<u32x4>(in + from);
        m[i] = load_whole<Bytes>(mask + from);
      } else {
        v[i] = load_staged<u32x4>(in + from, spans.cols - from, words);
        m[i] = load_staged<Bytes>(mask + from, spans.cols - from, stage);
      }
    }
    SP_UNROLL
    for (int i = 0; i < pieces; ++i) {
      const std::int64_t from = at + i * kWidth;
      unsigned kept;
      if constexpr (kLane<W> == 8) {
        kept = bytes_set(m[i].x) | bytes_set(m[i].y) << 4;
      } else {
        kept = bytes_set(m[i]);
      }
      const u32x4 y = keep<W>(v[i], kept);
      if constexpr (whole) {
        store_whole(out + from, y);
      } else {
        store_staged(out + from, y, spans.cols - from, words);
      }
    }
  }
};

// The bits are those given, or (by_cut) made: of what is above `cut` in magnitude.
template <typename W, bool by_cut>
struct MaskBits {
  static constexpr int kWidth = kPiece<W>;
  using Bits = std::conditional_t<by_cut, std::uint8_t, const std::uint8_t>;
  Global<const W> in;
  Global<Bits> bits;
  Global<W> out;
  int in_shift, out_shift, cut;

  SP_DEVICE bool aligned(const Spans& spans, std::int64_t row) const {
    return is_aligned(in_shift, row * spans.cols, kLane<W>) && is_aligned(out_shift, row * spans.cols, kLane<W>);
  }

  template <int pieces, bool whole>
  SP_DEVICE void run(const Spans& spans, std::int64_t row, std::int64_t at, Shared<std::uint8_t> stage) const {
    const Shared<W> words = reinterpret<W>(stage);
    const std::int64_t first = row * spans.cols + at, left = spans.cols - at;
    const Global<Bits> row_bits = bits + (row * spans.stride + at / 8);
    u32x4 v[pieces];
    unsigned kept[pieces];
    SP_UNROLL
    for (int i = 0; i < pieces; ++i) {
      if constexpr (whole) {
        v[i] = load_whole<u32x4>(in + (first + i * kWidth));
      } else {
        v[i] = load_staged<u32x4>(in + (first + i * kWidth), left - i * kWidth, words);
      }
      if constexpr (!by_cut) kept[i] = load_bits<W>(row_bits + i * kWidth / 8, left - i * kWidth);
    }
    SP_UNROLL
    for (int i = 0; i < pieces; ++i) {
      if constexpr (by_cut) {
        kept[i] = above<W>(v[i], cut);
        if constexpr (!whole) {
          // Past the row's end there are zeros, which a negative cut would keep.
          const std::int64_t mine = left - i * kWidth - lane_id() * kLane<W>;
          if (mine < kLane<W>) kept[i] &= mine > 0 ? (1u << mine) - 1 : 0u;
        }
        store_bits<W>(row_bits + i * kWidth / 8, kept[i], left - i * kWidth);
      }
      const u32x4 y = keep<W>(v[i], kept[i]);
      if constexpr (whole) {
        store_whole(out + (first + i * kWidth), y);
      } else {
        store_staged(out + (first + i * kWidth), y, left - i * kWidth, words);
      }
    }
  }
};

// Mask bytes go 16 a lane: 2 bytes of bits.
struct BytesToBits {
  static constexpr int kWidth = kPiece<std::uint8_t>;
  Global<const std::uint8_t> mask;
  Global<std::uint8_t> bits;
  int mask_shift, bits_shift;

  SP_DEVICE bool aligned(const Spans& spans, std::int64_t row) const {
    return is_aligned(mask_shift, row * spans.cols, 16) && is_aligned(bits_shift, row * spans.stride, 2);
  }

  template <int pieces, bool whole>
  SP_DEVICE void run(const Spans& spans, std::int64_t row, std::int64_t at, Shared<std::uint8_t> stage) const {
    u32x4 m[pieces];
    SP_UNROLL
    for (int i = 0; i < pieces; ++i) {
      const std::int64_t from = at + i * kWidth;
      if constexpr (whole) {
        m[i] = load_whole<u32x4>(mask + (row * spans.cols + from));
      } else {
        m[i] = load_staged<u32x4>(mask + (row * spans.cols + from), spans.cols - from, stage);
      }
    }
    SP_UNROLL
    for (int i = 0; i < pieces; ++i) {
      const std::int64_t to = (at + i * kWidth) / 8;
      const unsigned set = bytes_set(m[i].x) | bytes_set(m[i].y) << 4 | bytes_set(m[i].z) << 8 | bytes_set(m[i].w) << 12;
      const auto kept = static_cast<std::uint16_t>(set);
      if constexpr (whole) {
        store_whole(bits + (row * spans.stride + to), kept);
      } else {
        store_staged(bits + (row * spans.stride + to), kept, spans.stride - to, stage);
      }
    }
  }
};

struct BitsToBytes {
  static constexpr int kWidth = kPiece<std::uint8_t>;
  Global<const std::uint8_t> bits;
  Global<std::uint8_t> mask;
  int bits_shift, mask_shift;

  SP_DEVICE bool aligned(const Spans& spans, std::int64_t row) const {
    return is_aligned(mask_shift, row * spans.cols, 16) && is_aligned(bits_shift, row * spans.stride, 2);
  }

  template <int pieces, bool whole>
  SP_DEVICE void run(const Spans& spans, std::int64_t row, std::int64_t at, Shared<std::uint8_t> stage) const {
    unsigned kept[pieces];
    SP_UNROLL
    for (int i = 0; i < pieces; ++i) {
      const std::int64_t from = (at + i * kWidth) / 8;
      if constexpr (whole) {
        kept[i] = load_whole<std::uint16_t>(bits + (row * spans.stride + from));
      } else {
        kept[i] = load_staged<std::uint16_t>(bits + (row * spans.stride + from), spans.stride - from, stage);
      }
    }
    SP_UNROLL
    for (int i = 0; i < pieces; ++i) {
      const std::int64_t to = at + i * kWidth;
      const u32x4 m = {spread_bits(kept[i] & 15u), spread_bits(kept[i] >> 4 & 15u), spread_bits(kept[i] >> 8 & 15u),
                       spread_bits(kept[i] >> 12)};
      if constexpr (whole) {
        store_whole(mask + (row * spans.cols + to), m);
      } else {
        store_staged(mask + (row * spans.cols + to), m, spans.cols - to, stage);
      }
    }
  }
};

template <typename Op>
SP_KERNEL SP_THREADS(kThreads, 4) spans_kernel(Op op, Spans spans) {
  constexpr int span = kPieces * Op::kWidth;
  const Shared<std::uint8_t> stage = shared_memory<std::uint8_t>(warp() * kPieceBytes);
  for (std::int64_t task = first_task(); task < spans.rows * spans.per_row; task += task_step()) {
    const std::int64_t row = task / spans.per_row, begin = task % spans.per_row * span;
    if (op.aligned(spans, row) && begin + span <= spans.cols) {
      op.template run<kPieces, true>(spans, row, begin, stage);
      continue;
    }
    for (std::int64_t at = begin; at < begin + span && at < spans.cols; at += Op::kWidth) {
      op.template run<1, false>(spans, row, at, stage);
    }
  }
}

template <typename Op>
int run_spans(const char* name, const Op& op, std::int64_t rows, std::int64_t cols, void* stream) {
  const Spans spans{rows, cols, ceil_div(cols, 8), ceil_div(cols, kPieces * Op::kWidth)};
  const Grid grid{name, blocks_for(rows * spans.per_row, kWarps), 1, 1, kThreads, kWarps * kPieceBytes, stream};
  return launch(grid, spans_kernel<Op>, op, spans);
}
// A matrix whose rows share no byte of the bits is one long row.
template <typename Op>
int run_rows(const char* name, const Op& op, std::int64_t rows, std::int64_t cols, void* stream) {
  return cols % 8 == 0 ? run_spans(name, op, 1, rows * cols, stream) : run_spans(name, op, rows, cols, stream);
}

// The largest magnitude of dtype, as bits, that is at most `limit`; -1: none is. Bits order magnitudes as their values, NaN
// above all: so the kernel compares integers.
int largest_dropped(DType dtype, float limit) {
  if (!(limit >= 0)) return -1;
  std::uint32_t bits;
  std::memcpy(&bits, &limit, 4);
  bits &= 0x7fffffffu;
  if (dtype == DType::f32) return static_cast<int>(bits);
  if (dtype == DType::bf16) return static_cast<int>(bits >> 16);
  if (limit >= 65504.0f) return bits == 0x7f800000u ? 0x7c00 : 0x7bff;
  if (limit < 0x1p-14f) return static_cast<int>(limit * 0x1p24f);  // subnormal: steps of 2^-24
  return static_cast<int>(bits >> 13) - (112 << 10);               // exponent bias 127 to 15, mantissa cut to 10 bits
}

template <typename W>
int run_mask_bytes(const void* in, const std::uint8_t* mask, void* out, std::int64_t n, void* stream) {
  const auto* x = static_cast<const W*>(in);
  auto* y = static_cast<W*>(out);
  const MaskBytes<W> op{x, mask, y, shift_of(x), shift_of(mask), shift_of(y)};
  return run_spans(by_width<W>("mask_bytes_16", "mask_bytes_32"), op, 1, n, stream);
}

template <typename W>
int run_mask_bits(const Matrix& m, const void* in, const std::uint8_t* bits, void* out, void* stream) {
  const auto* x = static_cast<const W*>(in);
  auto* y = static_cast<W*>(out);
  const MaskBits<W, false> op{x, bits, y, shift_of(x), shift_of(y), 0};
  return run_rows(by_width<W>("mask_bits_16", "mask_bits_32"), op, m.rows, m.cols, stream);
}

template <typename W>
int run_threshold(const Matrix& m, const void* in, float limit, void* out, std::uint8_t* bits, void* stream) {
  const auto* x = static_cast<const W*>(in);
  auto* y = static_cast<W*>(out);
  const MaskBits<W, true> op{x, bits, y, shift_of(x), shift_of(y), largest_dropped(m.dtype, limit)};
  return run_rows(by_width<W>("threshold_16", "threshold_32"), op, m.rows, m.cols, stream);
}

}  // namespace

int mask_bytes(DType dtype, const void* in, const std::uint8_t* mask, void* out, std::int64_t n, void* stream) {
  if (n == 0) return 0;
  return size_of(dtype) == 2 ? run_mask_bytes<std::uint16_t>(in, mask, out, n, stream)
                             : run_mask_bytes<std::uint32_t>(in, mask, out, n, stream);
}

int mask_bits(const Matrix& m, const void* in, const std::uint8_t* bits, void* out, void* stream) {
  if (m.rows * m.cols == 0) return 0;
  return size_of(m.dtype) == 2 ? run_mask_bits<std::uint16_t>(m, in, bits, out, stream)
                               : run_mask_bits<std::uint32_t>(m, in, bits, out, stream);
}

int threshold(const Matrix& m, const void* in, float limit, void* out, std::uint8_t* bits, void* stream) {
  if (m.rows * m.cols == 0) return 0;
  return size_of(m.dtype) == 2 ? run_threshold<std::uint16_t>(m, in, limit, out, bits, stream)
                               : run_threshold<std::uint32_t>(m, in, limit, out, bits, stream);
}

int bytes_to_bits(std::int64_t rows, std::int64_t cols, const std::uint8_t* mask, std::uint8_t* bits, void* stream) {
  if (rows * cols == 0) return 0;
  return run_rows("bytes_to_bits", BytesToBits{mask, bits, shift_of(mask), shift_of(bits)}, rows, cols, stream);
}

int bits_to_bytes(std::int64_t rows, std::int64_t cols, const std::uint8_t* bits, std::uint8_t* mask, void* stream) {
  if (rows * cols == 0) return 0;
  return run_rows("bits_to_bytes", BitsToBytes{bits, mask, shift_of(bits), shift_of(mask)}, rows, cols, stream);
}

}  // namespace sparseprune::cuda
