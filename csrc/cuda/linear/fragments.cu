// Which encoding runs. The kernels are compiled in files of their own, a file each, so that a build is shared out.
#include "core/layouts/fragments.h"
#include "cuda/launchers.h"

namespace sparseprune::cuda {

// fragments.cuh
template <int BITS, bool TWO_FOUR, bool MINIMUMS>
int linear_fragments_of(const LinearCall& call, const Geometry& g);

int linear_fragments(const LinearCall& call, const Geometry& g) {
  const fragments::Unit unit = fragments::unit_of(call.packing);
  if (unit.minimums) return linear_fragments_of<4, false, true>(call, g);
  if (unit.two_four) {
    return unit.bits == 4 ? linear_fragments_of<4, true, false>(call, g) : linear_fragments_of<8, true, false>(call, g);
  }
  return unit.bits == 4 ? linear_fragments_of<4, false, false>(call, g) : linear_fragments_of<8, false, false>(call, g);
}

}  // namespace sparseprune::cuda
