// Threads: the OpenMP pool that torch uses (the same runtime, loaded first by torch), asked for n threads a call.
#pragma once

#include <atomic>
#include <cstdint>

namespace sparseprune {

// How many threads a region may use: n, or 1 in a forked child, where the parent's pool does not exist.
int usable_threads(int n);

// Hands out [0, units) in chunks to the threads of the region it is shared by. Chunks are contiguous and few, so that
// each thread streams memory, but more than the threads, so that a slowed core does not hold up the others.
class WorkQueue {
 public:
  WorkQueue(std::int64_t units, int threads)
      : units_(units), grain_(threads <= 1 ? units : 1 + (units - 1) / (std::int64_t{8} * threads)) {}

  bool next(std::int64_t* begin, std::int64_t* end) {
    *begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (*begin >= units_) return false;
    *end = *begin + grain_ < units_ ? *begin + grain_ : units_;
    return true;
  }

 private:
  std::int64_t units_, grain_;
  std::atomic<std::int64_t> next_{0};
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
