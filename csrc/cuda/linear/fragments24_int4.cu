// 2:4 int4.
#include "cuda/linear/fragments.cuh"

template int sparseprune::cuda::linear_fragments_of<4, true, false>(const LinearCall&, const Geometry&);
