// Which configuration runs. The kernels are compiled in three other files, so that the longest part of a build is shared
// out.
#include <iterator>
#include <utility>

#include "cuda/launchers.h"
#include "cuda/linear/sparse24.h"

namespace sparseprune::cuda {

// sparse24.cuh; instantiated in sparse24_small.cu, _medium.cu and _large.cu
template <typename T, int CONFIG>
int launch_sparse24(const LinearCall& call, const Geometry& g);

namespace {

template <typename T, int... CONFIG>
int run(const LinearCall& call, const Geometry& g, std::integer_sequence<int, CONFIG...>) {
  using Launch = int (*)(const LinearCall&, const Geometry&);
  static constexpr Launch launches[] = {launch_sparse24<T, CONFIG>...};
  return launches[call.plan.config](call, g);
}

}  // namespace

int linear_sparse24(const LinearCall& call, const Geometry& g) {
  constexpr auto all = std::make_integer_sequence<int, static_cast<int>(std::size(kSparse24Configs))>{};
  return call.packing.dtype == DType::bf16 ? run<bf16>(call, g, all) : run<f16>(call, g, all);
}

}  // namespace sparseprune::cuda
