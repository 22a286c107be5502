// Tiles for 64 batch rows, where memory and tensor cores meet.
#include "cuda/linear/sparse24.cuh"

namespace sparseprune::cuda {

template int launch_sparse24<bf16, 3>(const LinearCall&, const Geometry&);
template int launch_sparse24<f16, 3>(const LinearCall&, const Geometry&);
template int launch_sparse24<bf16, 4>(const LinearCall&, const Geometry&);
template int launch_sparse24<f16, 4>(const LinearCall&, const Geometry&);

}  // namespace sparseprune::cuda
