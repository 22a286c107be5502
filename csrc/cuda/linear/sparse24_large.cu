// Tiles for 128 batch rows and more: bound by the tensor cores.
#include "cuda/linear/sparse24.cuh"

namespace sparseprune::cuda {

template int launch_sparse24<bf16, 5>(const LinearCall&, const Geometry&);
template int launch_sparse24<f16, 5>(const LinearCall&, const Geometry&);
template int launch_sparse24<bf16, 6>(const LinearCall&, const Geometry&);
template int launch_sparse24<f16, 6>(const LinearCall&, const Geometry&);
template int launch_sparse24<bf16, 7>(const LinearCall&, const Geometry&);
template int launch_sparse24<f16, 7>(const LinearCall&, const Geometry&);

}  // namespace sparseprune::cuda
