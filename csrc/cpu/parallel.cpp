#include "cpu/parallel.h"

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
  return n <= 1 || g_forked.load(std::memory_order_relaxed) ? 1 : n;
}

}  // namespace sparseprune
