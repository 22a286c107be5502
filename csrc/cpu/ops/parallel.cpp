#include "cpu/ops/parallel.h"

#include <omp.h>
#include <pthread.h>

namespace sparseprune {
namespace {

std::atomic<bool> g_forked{false};

struct ForkWatch {
  ForkWatch() {
    pthread_atfork(nullptr, nullptr, [] { g_forked.store(true, std::memory_order_relaxed); });
  }
};
const ForkWatch g_watch;

}  // namespace

int usable_threads(int n) {
  if (n <= 1 || g_forked.load(std::memory_order_relaxed)) return 1;
  return n < kMaxThreads ? n : kMaxThreads;
}

int thread_index() {
  return omp_get_thread_num();
}

}  // namespace sparseprune
