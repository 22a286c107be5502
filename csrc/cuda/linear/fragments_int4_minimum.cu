// Dense int4 with minimums.
#include "cuda/linear/fragments.cuh"

template int sparseprune::cuda::linear_fragments_of<4, false, true>(const LinearCall&, const Geometry&);
