// Masks over dense words: out = x where the mask keeps it, else +0.0.
//
// Layouts   x, out [rows, cols] row-major; mask bytes [rows, cols], any non-zero keeps; bits [rows, ceil(cols / 8)].
// Needs     nothing of shape or alignment; out may be x (a warp reads its span before it writes it).
// Partition a warp a span of 4 pieces (words.cuh) of a row:  row | span 0 | span 1 | ...   Where cols % 8 == 0 no byte of
// the
//           bits is shared by two rows, and the matrix is one long row: no ends, no short rows.
// Constants 4 pieces: 64 bytes a lane under way, which at half occupancy is twice what HBM3's latency asks for (3.3 TB/s x
//           700 ns / 132 SMs = 18 KB an SM). Blocks are not persistent: spans are equal and there is nothing to keep.
#include <cstring>

#include "cuda/words.cuh"

namespace sparseprune::cuda {
namespace {

constexpr int kPieces = 4;

struct Spans {
  std::int64_t rows, cols, stride;  // stride: bytes of a row of bits
  std::int64_t per_row;
};

// `width`: elements of a piece.
Spans spans_of(std::int64_t rows, std::int64_t cols, int width) {
  if (cols % 8 == 0) cols *= rows, rows = 1;
  return {rows, cols, ceil_div(cols, 8), ceil_div(cols, static_cast<std::int64_t>(kPieces) * width)};
}
Grid grid_of(const char* name, const Spans& s, void* stream) {
  return {name, blocks_for(s.rows * s.per_row, kWarps), 1, 1, kThreads, kWarps * kPieceBytes, stream};
}

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

template <typename W>
SP_KERNEL SP_THREADS(kThreads, 4) mask_bytes_kernel(Global<const W> in, int in_shift, Global<const std::uint8_t> mask,
                                                    int mask_shift, Global<W> out, int out_shift, Spans spans) {
  constexpr int each = kLane<W>, piece = kPiece<W>;
  using Bytes = std::conditional_t<each == 8, u32x2, std::uint32_t>;
  const Shared<W> stage = shared_memory<W>(warp() * kPieceBytes);
  const Shared<std::uint8_t> byte_stage = shared_memory<std::uint8_t>(warp() * kPieceBytes);
  const bool in_aligned = is_aligned(in_shift, 0, each), out_aligned = is_aligned(out_shift, 0, each);
  const bool mask_aligned = is_aligned(mask_shift, 0, each);
  for (std::int64_t task = first_task(); task < spans.per_row; task += task_step()) {
    const std::int64_t begin = task * kPieces * piece;
    u32x4 v[kPieces];
    Bytes m[kPieces];
    SP_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const std::int64_t at = begin + i * piece;
      v[i] = load_piece<u32x4>(in + at, spans.cols - at, in_aligned, stage);
      m[i] = load_piece<Bytes>(mask + at, spans.cols - at, mask_aligned, byte_stage);
    }
    SP_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const std::int64_t at = begin + i * piece;
      unsigned kept;
      if constexpr (each == 8) {
        kept = bytes_set(m[i].x) | bytes_set(m[i].y) << 4;
      } else {
        kept = bytes_set(m[i]);
      }
      store_piece(out + at, keep<W>(v[i], kept), spans.cols - at, out_aligned, stage);
    }
  }
}

template <typename W>
SP_KERNEL SP_THREADS(kThreads, 4) mask_bits_kernel(Global<const W> in, int in_shift, Global<const std::uint8_t> bits,
                                                   Global<W> out, int out_shift, Spans spans) {
  constexpr int each = kLane<W>, piece = kPiece<W>;
  const Shared<W> stage = shared_memory<W>(warp() * kPieceBytes);
  for (std::int64_t task = first_task(); task < spans.rows * spans.per_row; task += task_step()) {
    const std::int64_t row = task / spans.per_row, begin = task % spans.per_row * kPieces * piece;
    const std::int64_t first = row * spans.cols;
    const bool in_aligned = is_aligned(in_shift, first, each), out_aligned = is_aligned(out_shift, first, each);
    u32x4 v[kPieces];
    unsigned kept[kPieces];
    SP_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const std::int64_t at = begin + i * piece;
      v[i] = load_piece<u32x4>(in + (first + at), spans.cols - at, in_aligned, stage);
      kept[i] = load_bits<W>(bits + (row * spans.stride + at / 8), spans.cols - at);
    }
    SP_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const std::int64_t at = begin + i * piece;
      store_piece(out + (first + at), keep<W>(v[i], kept[i]), spans.cols - at, out_aligned, stage);
    }
  }
}

// Keeps what is above `cut` in magnitude, as bits.
template <typename W>
SP_KERNEL SP_THREADS(kThreads, 4) threshold_kernel(Global<const W> in, int in_shift, int cut, Global<W> out, int out_shift,
                                                   Global<std::uint8_t> bits, Spans spans) {
  constexpr int each = kLane<W>, piece = kPiece<W>;
  const Shared<W> stage = shared_memory<W>(warp() * kPieceBytes);
  for (std::int64_t task = first_task(); task < spans.rows * spans.per_row; task += task_step()) {
    const std::int64_t row = task / spans.per_row, begin = task % spans.per_row * kPieces * piece;
    const std::int64_t first = row * spans.cols;
    const bool in_aligned = is_aligned(in_shift, first, each), out_aligned = is_aligned(out_shift, first, each);
    u32x4 v[kPieces];
    SP_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const std::int64_t at = begin + i * piece;
      v[i] = load_piece<u32x4>(in + (first + at), spans.cols - at, in_aligned, stage);
    }
    SP_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const std::int64_t at = begin + i * piece, left = spans.cols - at;
      unsigned kept = above<W>(v[i], cut);
      // Past the row's end there are zeros, which a negative cut would keep.
      if (left < (lane_id() + 1) * each) kept &= left > lane_id() * each ? (1u << (left - lane_id() * each)) - 1 : 0u;
      store_piece(out + (first + at), keep<W>(v[i], kept), left, out_aligned, stage);
      store_bits<W>(bits + (row * spans.stride + at / 8), kept, left);
    }
  }
}

// Mask bytes are taken 16 a lane: 2 bytes of bits.
SP_KERNEL SP_THREADS(kThreads, 4) bytes_to_bits_kernel(Global<const std::uint8_t> mask, int mask_shift,
                                                       Global<std::uint8_t> bits, int bits_shift, Spans spans) {
  constexpr int piece = kPiece<std::uint8_t>;
  const Shared<std::uint8_t> stage = shared_memory<std::uint8_t>(warp() * kPieceBytes);
  for (std::int64_t task = first_task(); task < spans.rows * spans.per_row; task += task_step()) {
    const std::int64_t row = task / spans.per_row, begin = task % spans.per_row * kPieces * piece;
    const bool mask_aligned = is_aligned(mask_shift, row * spans.cols, 16);
    const bool bits_aligned = is_aligned(bits_shift, row * spans.stride, 2);
    u32x4 m[kPieces];
    SP_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const std::int64_t at = begin + i * piece;
      m[i] = load_piece<u32x4>(mask + (row * spans.cols + at), spans.cols - at, mask_aligned, stage);
    }
    SP_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const std::int64_t at = (begin + i * piece) / 8;
      const unsigned kept = bytes_set(m[i].x) | bytes_set(m[i].y) << 4 | bytes_set(m[i].z) << 8 | bytes_set(m[i].w) << 12;
      store_piece(bits + (row * spans.stride + at), static_cast<std::uint16_t>(kept), spans.stride - at, bits_aligned,
                  stage);
    }
  }
}

SP_KERNEL SP_THREADS(kThreads, 4) bits_to_bytes_kernel(Global<const std::uint8_t> bits, int bits_shift,
                                                       Global<std::uint8_t> mask, int mask_shift, Spans spans) {
  constexpr int piece = kPiece<std::uint8_t>;
  const Shared<std::uint8_t> stage = shared_memory<std::uint8_t>(warp() * kPieceBytes);
  for (std::int64_t task = first_task(); task < spans.rows * spans.per_row; task += task_step()) {
    const std::int64_t row = task / spans.per_row, begin = task % spans.per_row * kPieces * piece;
    const bool mask_aligned = is_aligned(mask_shift, row * spans.cols, 16);
    const bool bits_aligned = is_aligned(bits_shift, row * spans.stride, 2);
    unsigned kept[kPieces];
    SP_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const std::int64_t at = (begin + i * piece) / 8;
      kept[i] = load_piece<std::uint16_t>(bits + (row * spans.stride + at), spans.stride - at, bits_aligned, stage);
    }
    SP_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const std::int64_t at = begin + i * piece;
      const u32x4 m = {spread_bits(kept[i] & 15u), spread_bits(kept[i] >> 4 & 15u), spread_bits(kept[i] >> 8 & 15u),
                       spread_bits(kept[i] >> 12)};
      store_piece(mask + (row * spans.cols + at), m, spans.cols - at, mask_aligned, stage);
    }
  }
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
  const Spans spans{1, n, 0, ceil_div(n, kPieces * kPiece<W>)};
  return launch(grid_of(by_width<W>("mask_bytes_16", "mask_bytes_32"), spans, stream), mask_bytes_kernel<W>, x, shift_of(x),
                mask, shift_of(mask), y, shift_of(y), spans);
}

template <typename W>
int run_mask_bits(const Matrix& m, const void* in, const std::uint8_t* bits, void* out, void* stream) {
  const auto* x = static_cast<const W*>(in);
  auto* y = static_cast<W*>(out);
  const Spans spans = spans_of(m.rows, m.cols, kPiece<W>);
  return launch(grid_of(by_width<W>("mask_bits_16", "mask_bits_32"), spans, stream), mask_bits_kernel<W>, x, shift_of(x),
                bits, y, shift_of(y), spans);
}

template <typename W>
int run_threshold(const Matrix& m, const void* in, float limit, void* out, std::uint8_t* bits, void* stream) {
  const auto* x = static_cast<const W*>(in);
  auto* y = static_cast<W*>(out);
  const Spans spans = spans_of(m.rows, m.cols, kPiece<W>);
  return launch(grid_of(by_width<W>("threshold_16", "threshold_32"), spans, stream), threshold_kernel<W>, x, shift_of(x),
                largest_dropped(m.dtype, limit), y, shift_of(y), bits, spans);
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
  const Spans spans = spans_of(rows, cols, kPiece<std::uint8_t>);
  return launch(grid_of("bytes_to_bits", spans, stream), bytes_to_bits_kernel, mask, shift_of(mask), bits, shift_of(bits),
                spans);
}

int bits_to_bytes(std::int64_t rows, std::int64_t cols, const std::uint8_t* bits, std::uint8_t* mask, void* stream) {
  if (rows * cols == 0) return 0;
  const Spans spans = spans_of(rows, cols, kPiece<std::uint8_t>);
  return launch(grid_of("bits_to_bytes", spans, stream), bits_to_bytes_kernel, bits, shift_of(bits), mask, shift_of(mask),
                spans);
}

}  // namespace sparseprune::cuda
