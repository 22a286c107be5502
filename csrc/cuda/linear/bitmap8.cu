// out = x weight^T + bias for unstructured bf16 and f16 weights, by tensor cores. The walk is linear_bitmap8.cuh's.
//
// Equation       For a unit: sum[16 rows][N] += W[16][64] x[N][64]^T, W with zeros where nothing is kept: there a NaN or an
//                infinity in x gives NaN.
// Operands       A, of mma.m16n8k16: the warp expands it, 4 bitmaps to the 4 registers of a step. B: x from shared memory by
//                ldmatrix.
// Preconditions  linear_bitmap8.cuh's.
// Partition      One warp has all N columns of its strip: a weight is expanded once for N batch rows.
// Constants      At 50 % and the bandwidth of an H100 an SM gets 13 weights a clock and issues 128 instructions: 10 a
//                weight, of which N = 8 takes 9 (counted in its machine code: 57 a unit and lane to index it, 43 a step, 55
//                to fetch the next); the pipe of shuffles and shared memory has some 70 of the 79 clocks a unit. N = 64
//                makes 8 mma of each expanded step, which then take about as long as expanding it.
#include <iterator>
#include <utility>

#include "cuda/linear/bitmap8.cuh"
#include "cuda/linear/bitmap8.h"

namespace sparseprune::cuda {
namespace {

// A lane's two values of four bitmaps, zeros where there are none: the A registers of a step. Both values are read always,
// and a byte permutation puts them where they belong. Its selector follows from the two bits of `keep`:
//   0: 3232 (no value; the upper halves of what was read are zero)  1: 3210  2: 1032  3: 5410
// and is itself looked up by a byte permutation, for two bitmaps at once.
SP_DEVICE void expand(const Bitmap8Step& step, unsigned slot, std::uint32_t (&a)[4]) {
  constexpr std::uint32_t kSelect01 = 0x32103232u, kSelect23 = 0x54101032u;
  const std::uint32_t control = step.keep * 0x22u + 0x10101010u;  // bytes 2 keep and 2 keep + 1 of the eight
  const std::uint32_t low = simt::byte_perm(kSelect01, kSelect23, control);
  const std::uint32_t high = simt::byte_perm(kSelect01, kSelect23, control >> 16);
  const unsigned at[4] = {byte_offset<0, 2>(step, slot), byte_offset<1, 2>(step, slot), byte_offset<2, 2>(step, slot),
                          byte_offset<3, 2>(step, slot)};
  SP_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto p = simt::shared_at<std::uint16_t>(at[i]);
    a[i] = simt::byte_perm(p[0], p[1], (i < 2 ? low : high) >> 16 * (i % 2));
  }
}

template <typename Tile>
class TensorCoreSum {
  using T = typename Tile::T;

 public:
  // An ldmatrix brings 4 matrices of 8 batch rows x 8 columns: with N = 8 two steps' of one tile, else one step's of two
  // tiles.
  static SP_DEVICE unsigned x_lane() {
    const unsigned row = simt::lane() % 8, matrix = simt::lane() / 8;
    return Tile::kN == 8 ? row * Tile::kXPitch + 16 * matrix : (row + matrix / 2 * 8) * Tile::kXPitch + 16 * (matrix % 2);
  }

  SP_DEVICE void add(const Bitmap8Lane& me, const Bitmap8Unit& unit, unsigned slot, unsigned x) {
    if constexpr (Tile::kN == 8) {
      steps<0>(me, unit, slot, x);
      steps<2>(me, unit, slot, x);
    } else {
      step<0>(me, unit, slot, x);
      step<1>(me, unit, slot, x);
      step<2>(me, unit, slot, x);
      step<3>(me, unit, slot, x);
    }
  }

  // c0, c1 of a lane: row g, batch rows 2t and 2t + 1; c2, c3: row g + 8.
  SP_DEVICE void put(unsigned first) const {
    const auto p = simt::shared_memory<float>(first) + (2 * (simt::lane() % 4) * Tile::kPitch + simt::lane() / 4);
    SP_UNROLL
    for (int i = 0; i < Tile::kN / 8; ++i) {
      SP_UNROLL
      for (int j = 0; j < 4; ++j) p[(8 * i + j % 2) * Tile::kPitch + j / 2 * 8] = sums_[i][j];
    }
  }

 private:
  template <int STEP>
  SP_DEVICE void steps(const Bitmap8Lane& me, const Bitmap8Unit& unit, unsigned slot, unsigned x) {
    std::uint32_t a[4], b[4];
    simt::ldmatrix_x4(b, simt::shared_at<T>(x + 32 * STEP));
    expand(step_of<STEP>(me, unit), slot, a);
    simt::mma_m16n8k16<T>(sums_[0], a, {b[0], b[1]});
    expand(step_of<STEP + 1>(me, unit), slot, a);
    simt::mma_m16n8k16<T>(sums_[0], a, {b[2], b[3]});
  }

  template <int STEP>
  SP_DEVICE void step(const Bitmap8Lane& me, const Bitmap8Unit& unit, unsigned slot, unsigned x) {
    std::uint32_t a[4];
    expand(step_of<STEP>(me, unit), slot, a);
    SP_UNROLL
    for (int i = 0; i < Tile::kN / 8; i += 2) {
      std::uint32_t b[4];
      simt::ldmatrix_x4(b, simt::shared_at<T>(x + 8 * i * Tile::kXPitch + 32 * STEP));
      simt::mma_m16n8k16<T>(sums_[i], a, {b[0], b[1]});
      simt::mma_m16n8k16<T>(sums_[i + 1], a, {b[2], b[3]});
    }
  }

  float sums_[Tile::kN / 8][4] = {};
};

template <typename T, int CONFIG>
int launch(const LinearCall& call, const Geometry& geometry) {
  constexpr Bitmap8Config c = kBitmap8Configs[CONFIG];
  using Tile = Bitmap8Tile<T, c.m / bitmap8::kRows, c.warps_k, c.n, c.stages, c.blocks>;
  return launch_linear_bitmap8<Tile, TensorCoreSum<Tile>>(
      std::is_same_v<T, bf16> ? "linear_bitmap8_bf16" : "linear_bitmap8_f16", call, geometry);
}

template <typename T, int... CONFIG>
int run(const LinearCall& call, const Geometry& geometry, std::integer_sequence<int, CONFIG...>) {
  using Launch = int (*)(const LinearCall&, const Geometry&);
  static constexpr Launch launches[] = {launch<T, CONFIG>...};
  return launches[call.plan.config](call, geometry);
}

}  // namespace

int linear_bitmap8(const LinearCall& call, const Geometry& geometry) {
  constexpr auto all = std::make_integer_sequence<int, static_cast<int>(std::size(kBitmap8Configs))>{};
  return call.packing.dtype == DType::bf16 ? run<bf16>(call, geometry, all) : run<f16>(call, geometry, all);
}

}  // namespace sparseprune::cuda
