// out = x weight^T + bias for unstructured float32 weights, by multiply-adds. The walk is linear_bitmap8.cuh's.
//
// Equation       For a unit: sum[16 rows][N] += W[16][64] x[N][64]^T, W with zeros where nothing is kept: there a NaN or an
//                infinity in x gives NaN.
// Operands       Lane 4g + t expands columns 2t and 2t + 1 of rows g and g + 8 of each 16 x 8 half of a step, as for tensor
//                cores, and reads these two columns of x [N][64] in shared memory, 8 bytes, once for both rows.
// Preconditions  linear_bitmap8.cuh's.
// Partition      One warp has all N columns of its strip; a quad of lanes has the sum of a row in four parts.
// Constants      At 50 % and the bandwidth of an H100 an SM gets 7 weights a clock and issues 128 instructions: 18 a weight,
//                of which N = 2 takes 13, N = 8 takes 21: multiply-adds are N a weight, kept or not.
#include <iterator>
#include <utility>

#include "cuda/linear/bitmap8.cuh"
#include "cuda/linear/bitmap8.h"

namespace sparseprune::cuda {
namespace {

SP_DEVICE float float_of(std::uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

template <typename Tile>
class MultiplyAddSum {
 public:
  static SP_DEVICE unsigned x_lane() {
    return 8 * (simt::lane() % 4);
  }

  SP_DEVICE void add(const Bitmap8Lane& me, const Bitmap8Unit& unit, unsigned slot, unsigned x) {
    step<0>(me, unit, slot, x);
    step<1>(me, unit, slot, x);
    step<2>(me, unit, slot, x);
    step<3>(me, unit, slot, x);
  }

  SP_DEVICE void put(unsigned first) const {
    const unsigned t = simt::lane() % 4;
    const auto p = simt::shared_memory<float>(first) + simt::lane() / 4;
    SP_UNROLL
    for (int n = 0; n < Tile::kN; ++n) {
      SP_UNROLL
      for (int r = 0; r < 2; ++r) {
        float sum = sums_[r][n];
        sum += simt::shuffle_xor(sum, 1);
        sum += simt::shuffle_xor(sum, 2);
        if (t == static_cast<unsigned>(n % 4)) p[n * Tile::kPitch + 8 * r] = sum;
      }
    }
  }

 private:
  template <int STEP>
  SP_DEVICE void step(const Bitmap8Lane& me, const Bitmap8Unit& unit, unsigned slot, unsigned x) {
    const Bitmap8Step s = step_of<STEP>(me, unit);
    const unsigned at[4] = {byte_offset<0, 4>(s, slot), byte_offset<1, 4>(s, slot), byte_offset<2, 4>(s, slot),
                            byte_offset<3, 4>(s, slot)};
    SP_UNROLL
    for (int half = 0; half < 2; ++half) {
      float w[2][2];  // row g or g + 8, column
      SP_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int i = 2 * half + r;
        const auto p = simt::shared_at<float>(at[i]);
        const float one = p[0], next = p[1];
        const bool left = (s.keep & 1u << 8 * i) != 0, right = (s.keep & 2u << 8 * i) != 0;
        w[r][0] = left ? one : 0.0f;
        w[r][1] = right ? left ? next : one : 0.0f;
      }
      SP_UNROLL
      for (int n = 0; n < Tile::kN; ++n) {
        const auto pair =
            simt::load<simt::u32x2>(simt::shared_at<float>(x + n * Tile::kXPitch + 4 * (16 * STEP + 8 * half)));
        const float x0 = float_of(pair.x), x1 = float_of(pair.y);
        SP_UNROLL
        for (int r = 0; r < 2; ++r) sums_[r][n] += w[r][0] * x0, sums_[r][n] += w[r][1] * x1;
      }
    }
  }

  float sums_[2][Tile::kN] = {};
};

template <int CONFIG>
int launch(const LinearCall& call, const Geometry& geometry) {
  constexpr Bitmap8Config c = kBitmap8ConfigsF32[CONFIG];
  using Tile = Bitmap8Tile<float, c.m / bitmap8::kRows, c.warps_k, c.n, c.stages, c.blocks>;
  return launch_linear_bitmap8<Tile, MultiplyAddSum<Tile>>("linear_bitmap8_f32", call, geometry);
}

template <int... CONFIG>
int run(const LinearCall& call, const Geometry& geometry, std::integer_sequence<int, CONFIG...>) {
  using Launch = int (*)(const LinearCall&, const Geometry&);
  static constexpr Launch launches[] = {launch<CONFIG>...};
  return launches[call.plan.config](call, geometry);
}

}  // namespace

int linear_bitmap8_f32(const LinearCall& call, const Geometry& geometry) {
  return run(call, geometry, std::make_integer_sequence<int, static_cast<int>(std::size(kBitmap8ConfigsF32))>{});
}

}  // namespace sparseprune::cuda
