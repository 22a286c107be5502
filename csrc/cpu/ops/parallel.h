// Threads: the OpenMP pool that torch uses (the same runtime, loaded first by torch), asked for n threads a call.
#pragma once

#include <atomic>
#include <cstdint>

namespace sparseprune {

constexpr int kMaxThreads = 256;

// How many threads a region may use: n, or 1 in a forked child, where the parent's pool does not exist.
int usable_threads(int n);
// This thread's number in the region.
int thread_index();

// Hands out [0, units) to the threads of a region. Each thread owns a contiguous share, the same in every call, so
// that its part of a cached weight stays in its core's cache; it takes its share in few large chunks, so that it
// streams memory, and then helps the others, so that a slowed core does not hold up the rest.
class WorkQueue {
 public:
  WorkQueue(std::int64_t units, int threads) : units_(units), threads_(threads) {
    share_ = (units + threads - 1) / threads;
    grain_ = threads == 1 ? share_ : (share_ + kChunks - 1) / kChunks;
    for (int t = 0; t < threads; ++t) next_[t].value.store(0, std::memory_order_relaxed);
  }

  bool next(std::int64_t* begin, std::int64_t* end) {
    const int self = thread_index();
    for (int i = 0; i < threads_; ++i) {
      const std::int64_t owner = (self + i) % threads_;
      std::atomic<std::int64_t>& taken = next_[owner].value;
      if (taken.load(std::memory_order_relaxed) >= share_) continue;
      const std::int64_t offset = taken.fetch_add(grain_, std::memory_order_relaxed);
      if (offset >= share_) continue;
      *begin = owner * share_ + offset;
      *end = owner * share_ + (offset + grain_ < share_ ? offset + grain_ : share_);
      if (*end > units_) *end = units_;
      if (*begin < *end) return true;
    }
    return false;
  }

 private:
  static constexpr std::int64_t kChunks = 4;
  struct alignas(64) Counter {
    std::atomic<std::int64_t> value;
  };
  std::int64_t units_, share_, grain_;
  int threads_;
  Counter next_[kMaxThreads];
};

template <typename Body>
void parallel_for(std::int64_t units, int threads, const Body& body) {
  threads = usable_threads(threads);
  if (units <= 0) return;
  if (threads <= 1 || units == 1) {
    body(std::int64_t{0}, units);
    return;
  }
  WorkQueue queue(units, threads);
#pragma omp parallel num_threads(threads)
  {
    std::int64_t begin, end;
    while (queue.next(&begin, &end)) body(begin, end);
  }
}

}  // namespace sparseprune
