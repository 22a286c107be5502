// Tiles for 8 to 32 batch rows: bound by memory.
#include "cuda/linear/sparse24.cuh"

namespace sparseprune::cuda {

template int launch_sparse24<bf16, 0>(const LinearCall&, const Geometry&);
template int launch_sparse24<f16, 0>(const LinearCall&, const Geometry&);
template int launch_sparse24<bf16, 1>(const LinearCall&, const Geometry&);
template int launch_sparse24<f16, 1>(const LinearCall&, const Geometry&);
template int launch_sparse24<bf16, 2>(const LinearCall&, const Geometry&);
template int launch_sparse24<f16, 2>(const LinearCall&, const Geometry&);

}  // namespace sparseprune::cuda
