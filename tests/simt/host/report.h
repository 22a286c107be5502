// What kernels did, added up over launches, by kernel.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "host/site.h"

namespace sparseprune::simt {

// Accesses of memory by whole warps from one line of source, over the first blocks of each launch.
//
// Shared memory: units are turns. Hardware takes as many as the fullest bank has words to give, 1 at best; an access of 8 or
// 16 bytes a lane is two or four requests, each with its own turns. Global memory: units are sectors of 32 bytes that an
// instruction touches. bytes / (32 units) is the share that is used.
struct Traffic {
  std::int64_t requests = 0, bytes = 0, units = 0;
  unsigned worst = 0;  // units of a request
};

struct KernelReport {
  std::int64_t launches = 0, blocks = 0;
  unsigned threads = 0, shared_bytes = 0;  // the most of all launches
  // By warps, cp_async by threads, sync_block by blocks.
  std::int64_t mma_sp = 0, mma = 0, ldmatrix = 0, shuffles = 0, sync_warp = 0, cp_async = 0, sync_block = 0;
  std::map<std::string, Traffic> shared, global;  // by file:line
};

KernelReport& counts();  // of the running kernel
void begin_counts(const std::string& kernel);
const std::map<std::string, KernelReport>& reports();
void clear_reports();

}  // namespace sparseprune::simt
