// Dense int8.
#include "cuda/linear/fragments.cuh"

template int sparseprune::cuda::linear_fragments_of<8, false, false>(const LinearCall&, const Geometry&);
