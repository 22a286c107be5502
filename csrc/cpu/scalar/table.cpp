#include "cpu/kernels.h"
#include "cpu/scalar/vec.h"

namespace sparseprune::scalar {
namespace {

#include "cpu/kernels/tile_rows.inl"

#include "cpu/kernels/tile_dense.inl"

#include "cpu/kernels/tile_batch.inl"

#include "cpu/kernels/csr.inl"

#include "cpu/kernels/panel.inl"

#include "cpu/kernels/words.inl"

#include "cpu/kernels/install.inl"

}  // namespace

void install(KernelTable& table) {
  table.isa = "scalar";
  install_all(table);
}

}  // namespace sparseprune::scalar
