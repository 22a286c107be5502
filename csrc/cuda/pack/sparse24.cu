// Dense words of 16 bits to 2:4 as mma.sp.m16n8k32 takes it, and back, in one pass.
//
//   chunk (4 columns of a row) -> two values, lower place first, and the nibble lower | higher << 2
//
// Layouts   dense [rows, cols] row-major; bits [rows, ceil(cols / 8)]; values and metadata of units of 32 rows x 64
//           columns, as core/layouts/sparse24.h lays them out.
// Needs     cols % 4 == 0; values and metadata at 16 bytes, as a blob's sections are. dense, bits: any alignment.
// Partition a warp a unit. Lane 4g + t has chunks t and t + 4 of each step of rows g, g + 8, g + 16, g + 24: 16 chunks,
//           the very ones whose values it stores, 16 bytes a tile and step: nothing goes through shared memory.
//
//             step 0 (chunks 0-7)   step 1        k = 0: row g         8-byte loads; a quad's are a full sector
//             t  .  .  . t+4 ..   | t .. t+4 ..   k = 1: row g + 8
//
//           A metadata word is made of nibbles of all four lanes of a quad, and a lane stores two words, neighbours in
//           memory: words are ORed over the quad while they are dealt out (quad_deal), and dealt back by shuffles
//           (quad_word). A row's 8 bytes of bits are two words of the same kind: lane t has those of row g + 8t.
// Constants 16 loads of 8 bytes under way a lane, 4 KB a warp: 8 warps hide the latency of HBM3 (masks.cu), and 3 blocks
//           of 8 fit beside the 80 registers that they take.
#include "core/layouts/sparse24.h"
#include "cuda/chunks.cuh"
#include "cuda/words.cuh"

namespace sparseprune::cuda {
namespace {

using namespace sparse24;

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue
constexpr int kSteps = 2, kHalves = 2, kRowsOfLane = 4;

struct Units {
  std::int64_t rows, groups, stride;  // groups: chunks of a row
  std::int64_t blocks, all;           // units side by side, and in all
  bool dense_aligned, bits_aligned;   // to 8 bytes, every chunk and every row's bits of a unit
};

template <typename T>
Units units_of(const Matrix& m, const T* dense, const std::uint8_t* bits) {
  const std::int64_t stride = ceil_div(m.cols, 8), blocks = m.cols > 0 ? ceil_div(m.cols, kCols) : 1;
  return {m.rows,
          m.cols / 4,
          stride,
          blocks,
          ceil_div(m.rows, kRows) * blocks,
          shift_of(dense) % 4 == 0,
          shift_of(bits) % 8 == 0 && stride % 8 == 0};
}

// Lane 4g + t stores the words of row g for tile t / 2 and half t % 2 of the chunks, one a step.
static_assert(word_index(16, 4) == 2 * 3 && word_index(1, 0) == 2 * 4 && word_index(0, 8) == 1, "two words a lane");

SP_DEVICE int quad() {
  return lane_id() & ~3;
}

// Words k, k + 1 of 8, each the OR of the quad's lanes, to lane k / 2 of the quad.
SP_DEVICE u32x2 quad_deal(const std::uint32_t (&words)[8]) {
  const bool upper = (lane_id() & 2) != 0, odd = (lane_id() & 1) != 0;
  std::uint32_t w[4];
  SP_UNROLL
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t mine = upper ? words[4 + i] : words[i], other = upper ? words[i] : words[4 + i];
    w[i] = mine | shuffle_xor(other, 2);
  }
  u32x2 v;
  v.x = (odd ? w[2] : w[0]) | shuffle_xor(odd ? w[0] : w[2], 1);
  v.y = (odd ? w[3] : w[1]) | shuffle_xor(odd ? w[1] : w[3], 1);
  return v;
}
// Back: word `step` of the quad's lane k.
SP_DEVICE std::uint32_t quad_word(const u32x2& mine, int k, int step) {
  return shuffle(step == 0 ? mine.x : mine.y, quad() + k);
}

SP_DEVICE unsigned nonzero(const u32x2& v) {
  return static_cast<unsigned>((v.x & 0x7fffu) != 0) | static_cast<unsigned>((v.x & 0x7fff0000u) != 0) << 1 |
         static_cast<unsigned>((v.y & 0x7fffu) != 0) << 2 | static_cast<unsigned>((v.y & 0x7fff0000u) != 0) << 3;
}
SP_DEVICE std::uint32_t word_at(const u32x2& v, unsigned place) {
  return (place & 2u ? v.y : v.x) >> (16 * (place & 1u)) & 0xffffu;
}

SP_DEVICE u32x2 load_chunk(Global<const std::uint16_t> p, bool aligned) {
  if (aligned) return load<u32x2>(p);
  std::uint32_t w[4];
  SP_UNROLL
  for (int i = 0; i < 4; ++i) w[i] = load<std::uint16_t>(p + i);
  return {w[0] | w[1] << 16, w[2] | w[3] << 16};
}
SP_DEVICE void store_chunk(Global<std::uint16_t> p, const u32x2& v, bool aligned) {
  if (aligned) {
    store(p, v);
    return;
  }
  SP_UNROLL
  for (unsigned i = 0; i < 4; ++i) store(p + static_cast<int>(i), static_cast<std::uint16_t>(word_at(v, i)));
}

// The lane's row of bits within the unit, `left` bytes of it (8 and more: all).
SP_DEVICE u32x2 load_row_bits(Global<const std::uint8_t> p, std::int64_t left, bool aligned) {
  if (aligned && left > 0) return load<u32x2>(p);
  std::uint64_t row = 0;
  for (int i = 0; i < 8 && i < left; ++i) row |= std::uint64_t{load<std::uint8_t>(p + i)} << (8 * i);
  return {static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32)};
}
SP_DEVICE void store_row_bits(Global<std::uint8_t> p, const u32x2& v, std::int64_t left, bool aligned) {
  if (aligned && left > 0) {
    store(p, v);
    return;
  }
  const std::uint64_t row = std::uint64_t{v.y} << 32 | v.x;
  for (int i = 0; i < 8 && i < left; ++i) store(p + i, static_cast<std::uint8_t>(row >> (8 * i)));
}

template <bool by_bits>
SP_KERNEL SP_THREADS(kThreads, 3)
    sparse24_pack_kernel(Global<const std::uint16_t> dense, Global<const std::uint8_t> bits, Units units,
                         Global<std::uint16_t> values, Global<std::uint32_t> metadata, Global<std::int64_t> error) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (std::int64_t unit = first_task(); unit < units.all; unit += task_step()) {
    const std::int64_t row0 = unit / units.blocks * kRows + g, block = unit % units.blocks;
    const std::int64_t chunk0 = block * (kCols / 4) + t;
    u32x2 v[kRowsOfLane][kSteps][kHalves];
    SP_UNROLL
    for (int k = 0; k < kRowsOfLane; ++k) {
      SP_UNROLL
      for (int i = 0; i < kSteps * kHalves; ++i) {
        const std::int64_t row = row0 + 8 * k, chunk = chunk0 + 4 * i;
        const bool inside = row < units.rows && chunk < units.groups;
        v[k][i / 2][i % 2] =
            inside ? load_chunk(dense + (row * units.groups + chunk) * 4, units.dense_aligned) : u32x2{0, 0};
      }
    }
    u32x2 row_bits{0, 0};
    if constexpr (by_bits) {
      const std::int64_t row = row0 + 8 * t;
      if (row < units.rows) {
        row_bits = load_row_bits(bits + (row * units.stride + 8 * block), units.stride - 8 * block, units.bits_aligned);
      }
    }
    std::uint32_t words[8] = {};  // [tile][half][step]
    SP_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      SP_UNROLL
      for (int tile = 0; tile < 2; ++tile) {
        std::uint32_t a[4];
        SP_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int k = 2 * tile + i;
          std::uint32_t kept_words = 0;
          if constexpr (by_bits) kept_words = quad_word(row_bits, k, step);
          SP_UNROLL
          for (int half = 0; half < kHalves; ++half) {
            const u32x2 x = v[k][step][half];
            const unsigned kept = by_bits ? kept_words >> (4 * (t + 4 * half)) & 15u : nonzero(x);
            const unsigned nibble = static_cast<unsigned>(kNibbles >> (4 * kept)) & 15u;
            a[i + 2 * half] = word_at(x, nibble & 3u) | word_at(x, nibble >> 2) << 16;
            words[(2 * tile + half) * 2 + step] |= nibble << word_shift(8 * i, t);
            const std::int64_t row = row0 + 8 * k, chunk = chunk0 + 8 * step + 4 * half;
            const int count = popc(kept);
            if ((by_bits ? count != 2 : count > 2) && row < units.rows && chunk < units.groups) {
              atomic_min(error, row * units.groups + chunk);
            }
          }
        }
        store(values + (unit * kValues + value_index(16 * tile + g, 8 * step + t)), u32x4{a[0], a[1], a[2], a[3]});
      }
    }
    store(metadata + (unit * kWords + 2 * lane_id()), quad_deal(words));
  }
}

SP_KERNEL SP_THREADS(kThreads, 4)
    sparse24_unpack_kernel(Global<const std::uint16_t> values, Global<const std::uint32_t> metadata, Units units,
                           Global<std::uint16_t> dense, Global<std::uint8_t> bits) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (std::int64_t unit = first_task(); unit < units.all; unit += task_step()) {
    const std::int64_t row0 = unit / units.blocks * kRows + g, block = unit % units.blocks;
    const std::int64_t chunk0 = block * (kCols / 4) + t;
    const u32x2 mine = load<u32x2>(metadata + (unit * kWords + 2 * lane_id()));
    u32x4 a[kSteps][2];
    SP_UNROLL
    for (int i = 0; i < kSteps * 2; ++i) {
      a[i / 2][i % 2] = load<u32x4>(values + (unit * kValues + value_index(16 * (i % 2) + g, 8 * (i / 2) + t)));
    }
    std::uint32_t row_bits[8] = {};  // [row of lane][step]
    SP_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      SP_UNROLL
      for (int tile = 0; tile < 2; ++tile) {
        const std::uint32_t pairs[4] = {a[step][tile].x, a[step][tile].y, a[step][tile].z, a[step][tile].w};
        SP_UNROLL
        for (int half = 0; half < kHalves; ++half) {
          const std::uint32_t word = quad_word(mine, 2 * tile + half, step);
          SP_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int k = 2 * tile + i;
            const std::int64_t row = row0 + 8 * k, chunk = chunk0 + 8 * step + 4 * half;
            if (row >= units.rows || chunk >= units.groups) continue;
            const unsigned nibble = word >> word_shift(8 * i, t) & 15u, lower = nibble & 3u, higher = nibble >> 2;
            const std::uint32_t pair = pairs[i + 2 * half];
            const std::uint64_t out = std::uint64_t{pair & 0xffffu} << (16 * lower) | std::uint64_t{pair >> 16}
                                                                                          << (16 * higher);
            row_bits[2 * k + step] |= (1u << lower | 1u << higher) << (4 * (t + 4 * half));
            if (dense) {
              store_chunk(dense + (row * units.groups + chunk) * 4,
                          u32x2{static_cast<std::uint32_t>(out), static_cast<std::uint32_t>(out >> 32)},
                          units.dense_aligned);
            }
          }
        }
      }
    }
    if (!bits) continue;
    const u32x2 own = quad_deal(row_bits);
    const std::int64_t row = row0 + 8 * t;
    if (row < units.rows) {
      store_row_bits(bits + (row * units.stride + 8 * block), own, units.stride - 8 * block, units.bits_aligned);
    }
  }
}

}  // namespace

int sparse24_pack(const Matrix& m, const void* dense, const std::uint8_t* bits, void* values, std::uint32_t* metadata,
                  std::int64_t* error, void* stream) {
  if (size_of(m.dtype) != 2 || m.cols % 4 != 0) return kInvalidValue;
  if (m.rows == 0) return 0;
  const auto* x = static_cast<const std::uint16_t*>(dense);
  auto* y = static_cast<std::uint16_t*>(values);
  const Units units = units_of(m, x, bits);
  const unsigned blocks = blocks_for(units.all, kWarps);
  if (bits == nullptr) {
    return launch({"sparse24_pack_16", blocks, 1, 1, kThreads, 0, stream}, sparse24_pack_kernel<false>, x, bits, units, y,
                  metadata, error);
  }
  return launch({"sparse24_pack_bits_16", blocks, 1, 1, kThreads, 0, stream}, sparse24_pack_kernel<true>, x, bits, units, y,
                metadata, error);
}

int sparse24_unpack(const Matrix& m, const void* values, const std::uint32_t* metadata, void* dense, std::uint8_t* bits,
                    void* stream) {
  if (size_of(m.dtype) != 2 || m.cols % 4 != 0) return kInvalidValue;
  if (m.rows * m.cols == 0) return 0;
  auto* y = static_cast<std::uint16_t*>(dense);
  const Units units = units_of(m, y, bits);
  return launch({"sparse24_unpack_16", blocks_for(units.all, kWarps), 1, 1, kThreads, 0, stream}, sparse24_unpack_kernel,
                static_cast<const std::uint16_t*>(values), metadata, units, y, bits);
}

}  // namespace sparseprune::cuda
