// Dense words to and from canonical (values + bits) and CSR weights, row by row.
//
//   values[offsets[r] + rank] = dense[r, c]     rank: how many elements of row r are kept left of column c
//
// Layouts   dense [rows, cols] row-major; bits [rows, ceil(cols / 8)], padding zero; offsets, crow int64 [rows + 1];
//           col int32.
// Needs     a row of less than 2^31 elements; no alignment.
// Partition a team a row: the 8 warps of a block, or, for short rows, one warp. A turn of the team is 8 (or 1)
//           neighbouring spans of 2 pieces (words.cuh):
//
//             row r | warp 0 | warp 1 | .. | warp 7 | warp 0 | ..      rank = of the turns before (a register)
//                   '------------ turn 0 -----------'                       + of the warps before (shared memory)
//                                                                           + of the lanes before (shuffles)
//
// Constants 2 pieces: their counts share the halves of a register, so that one scan of shuffles serves both.
#include "cuda/words.cuh"

namespace sparseprune::cuda {
namespace {

constexpr int kPieces = 2;
constexpr unsigned kSumBytes = 128;  // int [2][kWarps], at the beginning of shared memory; the warps' stages follow
template <typename W>
constexpr int kSpan = kPieces * kPiece<W>;
static_assert(kPiece<std::uint16_t> < 1 << 16, "two pieces' counts share a register");

struct Rows {
  std::int64_t rows, cols, stride;  // stride: bytes of a row of bits
  bool whole_block;                 // a row's team is a block
};

struct Team {
  std::int64_t row, step;  // the first row and how far the next is
  int member, size;        // in warps
};
SP_DEVICE Team team_of(const Rows& shape) {
  if (shape.whole_block)
    return {static_cast<std::int64_t>(block_x()), static_cast<std::int64_t>(grid_x()), static_cast<int>(warp()), kWarps};
  return {first_task(), task_step(), 0, 1};
}

// Sums over a team's warps: of those before this one, and of all.
struct Sums {
  int before, all;
};
// `turn` alternates between two sets of sums: a warp may be a barrier ahead of one that still reads.
SP_DEVICE Sums team_sums(const Team& team, int own, int& turn) {
  if (team.size == 1) return {0, own};
  const Shared<int> sums = shared_memory<int>(0) + turn * kWarps;
  turn ^= 1;
  if (lane_id() == 0) store(sums + team.member, own);
  sync_block();
  Sums s{0, 0};
  SP_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    const int sum = load<int>(sums + w);
    if (w < team.member) s.before += sum;
    s.all += sum;
  }
  return s;
}

SP_DEVICE int warp_sum(int v) {
  SP_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

// Ranks within a span: of each piece's first kept element of this lane; and all that are kept.
struct Ranks {
  int first[kPieces];
  int all;
};
SP_DEVICE Ranks ranks_of(const unsigned (&kept)[kPieces]) {
  const int own = popc(kept[0]) | popc(kept[1]) << 16;
  const int upto = inclusive_sum(own);
  const int sums = shuffle(upto, 31), before = upto - own;
  const int piece0 = sums & 0xffff;
  return {{before & 0xffff, piece0 + (before >> 16)}, piece0 + (sums >> 16)};
}

// counts [rows] of the non-zeros and, where wanted, their bits.
template <typename W>
SP_KERNEL SP_THREADS(kThreads, 4)
    scan_dense_kernel(Global<const W> dense, int shift, Rows shape, Global<std::uint8_t> bits, Global<std::int64_t> counts) {
  const Shared<W> stage = shared_memory<W>(kSumBytes + warp() * kPieceBytes);
  const Team team = team_of(shape);
  int turn = 0;
  for (std::int64_t row = team.row; row < shape.rows; row += team.step) {
    const std::int64_t first = row * shape.cols;
    const bool aligned = is_aligned(shift, first, kLane<W>);
    int kept = 0;
    for (std::int64_t begin = team.member * kSpan<W>; begin < shape.cols; begin += team.size * kSpan<W>) {
      u32x4 v[kPieces];
      SP_UNROLL
      for (int i = 0; i < kPieces; ++i) {
        const std::int64_t at = begin + i * kPiece<W>;
        v[i] = load_piece<u32x4>(dense + (first + at), shape.cols - at, aligned, stage);
      }
      SP_UNROLL
      for (int i = 0; i < kPieces; ++i) {
        const std::int64_t at = begin + i * kPiece<W>;
        const unsigned own = above<W>(v[i], 0);
        kept += popc(own);
        if (bits) store_bits<W>(bits + (row * shape.stride + at / 8), own, shape.cols - at);
      }
    }
    const Sums sums = team_sums(team, warp_sum(kept), turn);
    if (team.member == 0 && lane_id() == 0) store(counts + row, static_cast<std::int64_t>(sums.all));
  }
}

// counts [rows] of given bits, taken 16 bytes a lane; error: the first row with a bit set in `padding` of its last byte.
SP_KERNEL SP_THREADS(kThreads, 4) count_bits_kernel(Global<const std::uint8_t> bits, int shift, Rows shape, unsigned padding,
                                                    Global<std::int64_t> counts, Global<std::int64_t> error) {
  const Shared<std::uint8_t> stage = shared_memory<std::uint8_t>(kSumBytes + warp() * kPieceBytes);
  const Team team = team_of(shape);
  int turn = 0;
  for (std::int64_t row = team.row; row < shape.rows; row += team.step) {
    const std::int64_t first = row * shape.stride;
    const bool aligned = is_aligned(shift, first, 16);
    int kept = 0;
    for (std::int64_t at = team.member * kPiece<std::uint8_t>; at < shape.stride; at += team.size * kPiece<std::uint8_t>) {
      const u32x4 v = load_piece<u32x4>(bits + (first + at), shape.stride - at, aligned, stage);
      kept += popc(v.x) + popc(v.y) + popc(v.z) + popc(v.w);
    }
    const Sums sums = team_sums(team, warp_sum(kept), turn);
    if (team.member == 0 && lane_id() == 0) {
      store(counts + row, static_cast<std::int64_t>(sums.all));
      if (padding != 0 && (load<std::uint8_t>(bits + (first + shape.stride - 1)) & padding) != 0) atomic_min(error, row);
    }
  }
}

// A thread has 8 groups of m columns: m whole bytes, which are nobody else's. Groups are few beside the weights, so bytes
// do.
SP_KERNEL SP_THREADS(kThreads, 4)
    fill_groups_kernel(Global<std::uint8_t> bits, std::int64_t rows, std::int64_t groups, std::int64_t stride,
                       std::int64_t per_row, int n, int m, Global<std::int64_t> error) {
  const std::uint64_t all = (std::uint64_t{1} << m) - 1;
  const std::int64_t step = static_cast<std::int64_t>(grid_x()) * kThreads;
  for (std::int64_t task = static_cast<std::int64_t>(block_x()) * kThreads + static_cast<int>(thread_x());
       task < rows * per_row; task += step) {
    const std::int64_t row = task / per_row, first = task % per_row * 8;
    const Global<std::uint8_t> bytes = bits + (row * stride + first / 8 * m);
    std::uint64_t in = 0, out = 0;  // bits read and not taken, bits made and not written
    int in_bits = 0, out_bits = 0, read = 0, written = 0;
    for (int g = 0; g < 8 && first + g < groups; ++g) {
      for (; in_bits < m; in_bits += 8) in |= std::uint64_t{load<std::uint8_t>(bytes + read++)} << in_bits;
      std::uint64_t kept = in & all;
      in >>= m, in_bits -= m;
      int missing = n - popc(kept);
      if (missing < 0) atomic_min(error, row * groups + first + g);
      for (; missing > 0; --missing) kept |= kept + 1;  // the lowest free one
      out |= kept << out_bits, out_bits += m;
      for (; out_bits >= 8; out_bits -= 8, out >>= 8) store(bytes + written++, static_cast<std::uint8_t>(out));
    }
    if (out_bits > 0) store(bytes + written, static_cast<std::uint8_t>(out));
  }
}

// Dense to values, kept by bits; or (csr) to columns and values of the non-zeros. A span is closed up in shared memory
// first: lanes scattering straight to global memory would touch every sector eight times.
template <typename W, bool csr>
SP_KERNEL SP_THREADS(kThreads, 4)
    compact_rows_kernel(Global<const W> dense, int shift, Rows shape, Global<const std::uint8_t> bits,
                        Global<const std::int64_t> offsets, Global<std::int32_t> col, Global<W> values) {
  constexpr unsigned values_bytes = kPieces * kPieceBytes, places_bytes = csr ? 2 * kSpan<W> : 0;
  const unsigned own_bytes = kSumBytes + warp() * (values_bytes + places_bytes);
  const Shared<W> stage = shared_memory<W>(own_bytes);
  const Shared<std::uint16_t> places = shared_memory<std::uint16_t>(own_bytes + values_bytes);
  const Team team = team_of(shape);
  int turn = 0;
  for (std::int64_t row = team.row; row < shape.rows; row += team.step) {
    const std::int64_t first = row * shape.cols;
    const bool aligned = is_aligned(shift, first, kLane<W>);
    std::int64_t done = load<std::int64_t>(offsets + row);
    for (std::int64_t turn_begin = 0; turn_begin < shape.cols; turn_begin += team.size * kSpan<W>) {
      const std::int64_t begin = turn_begin + team.member * kSpan<W>;
      u32x4 v[kPieces];
      unsigned kept[kPieces];
      SP_UNROLL
      for (int i = 0; i < kPieces; ++i) {
        const std::int64_t at = begin + i * kPiece<W>;
        v[i] = load_piece<u32x4>(dense + (first + at), shape.cols - at, aligned, stage);
        if constexpr (!csr) kept[i] = load_bits<W>(bits + (row * shape.stride + at / 8), shape.cols - at);
      }
      if constexpr (csr) {
        SP_UNROLL
        for (int i = 0; i < kPieces; ++i) kept[i] = above<W>(v[i], 0);
      }
      const Ranks ranks = ranks_of(kept);
      SP_UNROLL
      for (int i = 0; i < kPieces; ++i) {
        int rank = ranks.first[i];
        SP_UNROLL
        for (int e = 0; e < kLane<W>; ++e) {
          if ((kept[i] >> e & 1u) == 0) continue;
          store(stage + rank, element<W>(v[i], e));
          if constexpr (csr) {
            store(places + rank, static_cast<std::uint16_t>(i * kPiece<W> + lane_id() * kLane<W> + e));
          }
          ++rank;
        }
      }
      sync_warp();
      const Sums sums = team_sums(team, ranks.all, turn);
      const std::int64_t to = done + sums.before;
      for (int i = lane_id(); i < ranks.all; i += 32) {
        store(values + (to + i), load<W>(stage + i));
        if constexpr (csr) store(col + (to + i), static_cast<std::int32_t>(begin) + load<std::uint16_t>(places + i));
      }
      done += sums.all;
      sync_warp();  // the stage is written again
    }
  }
}

// Values to dense: lanes pick theirs from a window of a few hundred bytes, which L1 holds.
template <typename W>
SP_KERNEL SP_THREADS(kThreads, 4)
    expand_dense_kernel(Global<const W> values, Global<const std::uint8_t> bits, Global<const std::int64_t> offsets,
                        Rows shape, Global<W> dense, int shift) {
  const Shared<W> stage = shared_memory<W>(kSumBytes + warp() * kPieceBytes);
  const Team team = team_of(shape);
  int turn = 0;
  for (std::int64_t row = team.row; row < shape.rows; row += team.step) {
    const std::int64_t first = row * shape.cols;
    const bool aligned = is_aligned(shift, first, kLane<W>);
    std::int64_t done = load<std::int64_t>(offsets + row);
    for (std::int64_t turn_begin = 0; turn_begin < shape.cols; turn_begin += team.size * kSpan<W>) {
      const std::int64_t begin = turn_begin + team.member * kSpan<W>;
      unsigned kept[kPieces];
      SP_UNROLL
      for (int i = 0; i < kPieces; ++i) {
        const std::int64_t at = begin + i * kPiece<W>;
        kept[i] = load_bits<W>(bits + (row * shape.stride + at / 8), shape.cols - at);
      }
      const Ranks ranks = ranks_of(kept);
      const Sums sums = team_sums(team, ranks.all, turn);
      const Global<const W> from = values + (done + sums.before);
      SP_UNROLL
      for (int i = 0; i < kPieces; ++i) {
        const std::int64_t at = begin + i * kPiece<W>;
        std::uint32_t w[4] = {0, 0, 0, 0};
        int rank = ranks.first[i];
        SP_UNROLL
        for (int e = 0; e < kLane<W>; ++e) {
          if ((kept[i] >> e & 1u) == 0) continue;
          const std::uint32_t word = load_stream<W>(from + rank++);
          if constexpr (sizeof(W) == 4) {
            w[e] = word;
          } else {
            w[e / 2] |= word << (16 * (e % 2));
          }
        }
        store_piece(dense + (first + at), u32x4{w[0], w[1], w[2], w[3]}, shape.cols - at, aligned, stage);
      }
      done += sums.all;
    }
  }
}

// A row is zeroed and its columns are checked; only a row that is whole is written to, past a barrier.
template <typename W>
SP_KERNEL SP_THREADS(kThreads, 4)
    csr_to_dense_kernel(Global<const std::int64_t> crow, Global<const std::int32_t> col, std::int64_t nnz,
                        Global<const W> values, Rows shape, Global<W> dense, int shift, Global<std::int64_t> error) {
  const Shared<W> stage = shared_memory<W>(kSumBytes + warp() * kPieceBytes);
  const Team team = team_of(shape);
  int turn = 0;
  if (shape.rows == 0 && block_x() == 0 && thread_x() == 0 && (load<std::int64_t>(crow) != 0 || nnz != 0))
    atomic_min(error, 0);
  for (std::int64_t row = team.row; row < shape.rows; row += team.step) {
    const std::int64_t first = row * shape.cols;
    const bool aligned = is_aligned(shift, first, kLane<W>);
    std::int64_t begin = load<std::int64_t>(crow + row), end = load<std::int64_t>(crow + (row + 1));
    bool good = 0 <= begin && begin <= end && end <= nnz;
    if (row == 0) good = good && begin == 0;
    if (row == shape.rows - 1) good = good && end == nnz;
    if (!good) begin = end = 0;
    for (std::int64_t at = team.member * kPiece<W>; at < shape.cols; at += team.size * kPiece<W>) {
      store_piece(dense + (first + at), u32x4{0, 0, 0, 0}, shape.cols - at, aligned, stage);
    }
    const std::int64_t from = begin + team.member * 32 + lane_id();
    for (std::int64_t i = from; i < end; i += team.size * 32) {
      const std::int32_t last = i > begin ? load<std::int32_t>(col + (i - 1)) : -1, c = load<std::int32_t>(col + i);
      good = good && last < c && c < shape.cols;
    }
    sync_warp();  // zeros before values; a team of a block has the barrier of its sums
    const Sums bad = team_sums(team, popc(ballot(!good)), turn);
    if (bad.all != 0) {
      if (team.member == 0 && lane_id() == 0) atomic_min(error, row);
      continue;
    }
    for (std::int64_t i = from; i < end; i += team.size * 32) {
      store(dense + (first + load<std::int32_t>(col + i)), load<W>(values + i));
    }
  }
}

// `span`: elements of a turn of one warp. From three on a block is faster: fewer leave most of its warps idle.
Rows rows_of(std::int64_t rows, std::int64_t cols, std::int64_t length, std::int64_t span) {
  return {rows, cols, ceil_div(cols, 8), length > 2 * span};
}
Grid grid_of(const char* name, const Rows& shape, unsigned warp_bytes, void* stream) {
  const std::int64_t rows = shape.rows > 0 ? shape.rows : 1;
  return {name, blocks_for(rows, shape.whole_block ? 1 : kWarps), 1, 1, kThreads, kSumBytes + kWarps * warp_bytes, stream};
}

template <typename W>
int run_scan(const Matrix& m, const void* dense, std::uint8_t* bits, std::int64_t* counts, void* stream) {
  const auto* x = static_cast<const W*>(dense);
  const Rows shape = rows_of(m.rows, m.cols, m.cols, kSpan<W>);
  return launch(grid_of(by_width<W>("scan_dense_16", "scan_dense_32"), shape, kPieceBytes, stream), scan_dense_kernel<W>, x,
                shift_of(x), shape, bits, counts);
}

template <typename W>
int run_compress(const Matrix& m, const void* dense, const std::uint8_t* bits, const std::int64_t* offsets, void* values,
                 void* stream) {
  const auto* x = static_cast<const W*>(dense);
  const Rows shape = rows_of(m.rows, m.cols, m.cols, kSpan<W>);
  return launch(grid_of(by_width<W>("compress_dense_16", "compress_dense_32"), shape, kPieces * kPieceBytes, stream),
                compact_rows_kernel<W, false>, x, shift_of(x), shape, bits, offsets, static_cast<std::int32_t*>(nullptr),
                static_cast<W*>(values));
}

template <typename W>
int run_csr(const Matrix& m, const void* dense, const std::int64_t* crow, std::int32_t* col, void* values, void* stream) {
  const auto* x = static_cast<const W*>(dense);
  const Rows shape = rows_of(m.rows, m.cols, m.cols, kSpan<W>);
  return launch(
      grid_of(by_width<W>("dense_to_csr_16", "dense_to_csr_32"), shape, kPieces * kPieceBytes + 2 * kSpan<W>, stream),
      compact_rows_kernel<W, true>, x, shift_of(x), shape, static_cast<const std::uint8_t*>(nullptr), crow, col,
      static_cast<W*>(values));
}

template <typename W>
int run_expand(const Matrix& m, const void* values, const std::uint8_t* bits, const std::int64_t* offsets, void* dense,
               void* stream) {
  auto* y = static_cast<W*>(dense);
  const Rows shape = rows_of(m.rows, m.cols, m.cols, kSpan<W>);
  return launch(grid_of(by_width<W>("expand_dense_16", "expand_dense_32"), shape, kPieceBytes, stream),
                expand_dense_kernel<W>, static_cast<const W*>(values), bits, offsets, shape, y, shift_of(y));
}

template <typename W>
int run_csr_to_dense(const Matrix& m, const std::int64_t* crow, const std::int32_t* col, std::int64_t nnz,
                     const void* values, void* dense, std::int64_t* error, void* stream) {
  auto* y = static_cast<W*>(dense);
  const Rows shape = rows_of(m.rows, m.cols, m.cols, kSpan<W>);
  return launch(grid_of(by_width<W>("csr_to_dense_16", "csr_to_dense_32"), shape, kPieceBytes, stream),
                csr_to_dense_kernel<W>, crow, col, nnz, static_cast<const W*>(values), shape, y, shift_of(y), error);
}

}  // namespace

int scan_dense(const Matrix& m, const void* dense, std::uint8_t* bits, std::int64_t* counts, void* stream) {
  if (m.rows == 0) return 0;
  return size_of(m.dtype) == 2 ? run_scan<std::uint16_t>(m, dense, bits, counts, stream)
                               : run_scan<std::uint32_t>(m, dense, bits, counts, stream);
}

int count_bits(std::int64_t rows, std::int64_t cols, const std::uint8_t* bits, std::int64_t* counts, std::int64_t* error,
               void* stream) {
  if (rows == 0) return 0;
  const unsigned padding = cols % 8 == 0 ? 0u : 0xffu << (cols % 8) & 0xffu;
  const Rows shape = rows_of(rows, cols, ceil_div(cols, 8), kPiece<std::uint8_t>);
  return launch(grid_of("count_bits", shape, kPieceBytes, stream), count_bits_kernel, bits, shift_of(bits), shape, padding,
                counts, error);
}

int fill_groups(std::int64_t rows, std::int64_t cols, int n, int m, std::uint8_t* bits, std::int64_t* error, void* stream) {
  if (rows * cols == 0) return 0;
  const std::int64_t groups = cols / m, per_row = ceil_div(groups, 8);
  const Grid grid{"fill_groups", blocks_for(rows * per_row, kThreads), 1, 1, kThreads, 0, stream};
  return launch(grid, fill_groups_kernel, bits, rows, groups, ceil_div(cols, 8), per_row, n, m, error);
}

int compress_dense(const Matrix& m, const void* dense, const std::uint8_t* bits, const std::int64_t* offsets, void* values,
                   void* stream) {
  if (m.rows * m.cols == 0) return 0;
  return size_of(m.dtype) == 2 ? run_compress<std::uint16_t>(m, dense, bits, offsets, values, stream)
                               : run_compress<std::uint32_t>(m, dense, bits, offsets, values, stream);
}

int expand_dense(const Matrix& m, const void* values, const std::uint8_t* bits, const std::int64_t* offsets, void* dense,
                 void* stream) {
  if (m.rows * m.cols == 0) return 0;
  return size_of(m.dtype) == 2 ? run_expand<std::uint16_t>(m, values, bits, offsets, dense, stream)
                               : run_expand<std::uint32_t>(m, values, bits, offsets, dense, stream);
}

int dense_to_csr(const Matrix& m, const void* dense, const std::int64_t* crow, std::int32_t* col, void* values,
                 void* stream) {
  if (m.rows * m.cols == 0) return 0;
  return size_of(m.dtype) == 2 ? run_csr<std::uint16_t>(m, dense, crow, col, values, stream)
                               : run_csr<std::uint32_t>(m, dense, crow, col, values, stream);
}

// Runs on no rows too: crow has an entry to check.
int csr_to_dense(const Matrix& m, const std::int64_t* crow, const std::int32_t* col, std::int64_t nnz, const void* values,
                 void* dense, std::int64_t* error, void* stream) {
  return size_of(m.dtype) == 2 ? run_csr_to_dense<std::uint16_t>(m, crow, col, nnz, values, dense, error, stream)
                               : run_csr_to_dense<std::uint32_t>(m, crow, col, nnz, values, dense, error, stream);
}

}  // namespace sparseprune::cuda
