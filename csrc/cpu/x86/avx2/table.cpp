#include "cpu/kernels.h"
#include "cpu/x86/avx2/quant.h"

namespace sparseprune::avx2 {
namespace {

#include "cpu/kernels/tile_rows.inl"

#include "cpu/kernels/tile_dense.inl"

#include "cpu/kernels/tile_batch.inl"

#include "cpu/kernels/csr.inl"

#include "cpu/kernels/panel.inl"

#include "cpu/kernels/words.inl"

#include "cpu/kernels/rounding.inl"

#include "cpu/kernels/install.inl"

#include "cpu/kernels/bytes_panel.inl"

#include "cpu/kernels/quant_rows.inl"

#include "cpu/kernels/quads.inl"

#include "cpu/kernels/octets.inl"

#include "cpu/kernels/bitquads.inl"

}  // namespace

void install(KernelTable& table) {
  table.isa = "avx2";
  install_all(table);
  install_quant(table);
}

}  // namespace sparseprune::avx2
