#include "cpu/kernels.h"
#include "cpu/x86/avx512/vec.h"

namespace sparseprune::avx512 {
namespace {

#include "cpu/kernels/tile_rows.inl"

#include "cpu/kernels/tile_dense.inl"

#include "cpu/kernels/tile_batch.inl"

#include "cpu/kernels/csr.inl"

#include "cpu/kernels/panel.inl"

#include "cpu/kernels/words.inl"

#include "cpu/kernels/rounding.inl"

#include "cpu/kernels/install.inl"

#include "cpu/x86/avx512/words.inl"

}  // namespace

void install(KernelTable& table) {
  table.isa = "avx512";
  install_all(table);
  install_words(table);
}

}  // namespace sparseprune::avx512
