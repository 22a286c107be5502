#include "cpu/ops/rounding.h"

#include "cpu/dispatch/isa.h"
#include "cpu/ops/parallel.h"

namespace sparseprune {
namespace {

constexpr std::int64_t kSerial = 1 << 14;  // weights below which waking threads costs more than they save: a guess

// f(where the group begins in [rows, cols], how many columns, its grid, its place in [rows, groups])
template <typename F>
void for_groups(const RoundCall& call, const F& f) {
  const std::int64_t groups = (call.cols + call.group - 1) / call.group;
  const int threads = call.rows * call.cols < kSerial ? 1 : call.threads;
  parallel_for(call.rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t g = 0; g < groups; ++g) {
        const std::int64_t first = g * call.group, place = row * groups + g;
        const std::int64_t n = first + call.group < call.cols ? call.group : call.cols - first;
        const float scale = call.scales[place];
        const GroupGrid grid{scale,
                             scale == 0.0f ? 0.0f : 1.0f / scale,
                             call.minimums ? call.minimums[place] : 0.0f,
                             call.zero,
                             call.least,
                             call.largest};
        f(row * call.cols + first, n, grid, place);
      }
    }
  });
}

const std::uint8_t* at(const std::uint8_t* kept, std::int64_t i) {
  return kept == nullptr ? nullptr : kept + i;
}

}  // namespace

void round_to_values(const RoundCall& call, DType dtype, void* out) {
  const auto kernel = kernels().round.values[static_cast<int>(dtype)];
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  for_groups(call, [&](std::int64_t i, std::int64_t n, const GroupGrid& grid, std::int64_t) {
    kernel(call.weight + i, at(call.kept, i), n, grid, static_cast<char*>(out) + i * size);
  });
}

void round_to_codes(const RoundCall& call, std::int8_t* out) {
  const auto kernel = kernels().round.codes;
  for_groups(call, [&](std::int64_t i, std::int64_t n, const GroupGrid& grid, std::int64_t) {
    kernel(call.weight + i, at(call.kept, i), n, grid, out + i);
  });
}

void round_gradients(const RoundCall& call, DType dtype, const void* gradient, float* of_weight, float* of_scales,
                     float* of_minimums) {
  const auto kernel = kernels().round.gradients[static_cast<int>(dtype)];
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  for_groups(call, [&](std::int64_t i, std::int64_t n, const GroupGrid& grid, std::int64_t place) {
    float unused;
    kernel(call.weight + i, at(call.kept, i), static_cast<const char*>(gradient) + i * size, n, grid, of_weight + i,
           of_scales + place, of_minimums ? of_minimums + place : &unused);
  });
}

}  // namespace sparseprune
