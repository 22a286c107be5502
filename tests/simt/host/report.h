// What kernels did, added up over launches, by kernel.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "host/site.h"

namespace sparseprune::simt {

// Accesses of shared memory by whole warps from one line of source, over the first blocks of each launch. Hardware takes as
// many turns as the fullest bank has words to give: `ways`, 1 at best. An access of 8 or 16 bytes a lane is two or four
// requests, each its own turns.
struct BankConflicts {
  std::int64_t requests = 0, turns = 0;
  unsigned worst = 0;
};

struct KernelReport {
  std::int64_t launches = 0, blocks = 0;
  unsigned threads = 0, shared_bytes = 0;  // the most of all launches
  // By warps, cp_async by threads, sync_block by blocks.
  std::int64_t mma_sp = 0, mma = 0, ldmatrix = 0, shuffles = 0, sync_warp = 0, cp_async = 0, sync_block = 0;
  std::map<std::string, BankConflicts> conflicts;  // by file:line
};

KernelReport& counts();  // of the running kernel
void begin_counts(const std::string& kernel);
const std::map<std::string, KernelReport>& reports();
void clear_reports();

}  // namespace sparseprune::simt
