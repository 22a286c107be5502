// Shared-memory bank conflicts. Lanes run one after the other, so what a warp does in one instruction is put together from
// what each lane did at the same place in the source, for the same time since the warp's last collective.
#pragma once

#include <cstddef>

#include "host/site.h"

namespace sparseprune::simt {

void log_shared(std::size_t offset, unsigned bytes, const Location& at);       // by the running thread
void count_rows(const unsigned* offsets, unsigned count, const Location& at);  // rows of an ldmatrix, 8 a request
void count_logged(unsigned warp);                                              // and forget
void forget_logged();

}  // namespace sparseprune::simt
