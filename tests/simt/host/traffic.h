// What warps ask of memory: turns of shared memory's banks, sectors of global memory. Lanes run one after the other, so what
// a warp does in one instruction is put together from what each lane did at the same place in the source, for the same time
// since the warp's last collective.
#pragma once

#include <cstdint>

#include "host/machine.h"
#include "host/site.h"

namespace sparseprune::simt {

// By the running thread; of shared memory the address within it.
void log_access(Space space, std::uintptr_t address, unsigned bytes, Site site);
void count_rows(const std::uintptr_t* addresses, unsigned count, Site site);  // of an ldmatrix, 8 a request
void count_logged(unsigned warp);                                             // and forget
void forget_logged();

}  // namespace sparseprune::simt
