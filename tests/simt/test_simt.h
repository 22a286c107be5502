// What the emulator's own tests share: counted expectations, buffers, and kernels that must fault.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "simt.h"

namespace sparseprune::simt::test {

inline int passed = 0, failed = 0;

inline void expect(bool ok, const std::string& what) {
  ++(ok ? passed : failed);
  if (!ok) std::printf("FAILED: %s\n", what.c_str());
}
template <typename A, typename B>
void expect_equal(const A& got, const B& want, const std::string& what) {
  expect(got == want, what + ": got " + std::to_string(got) + ", want " + std::to_string(want));
}

// Registered for as long as it lives.
template <typename T>
class Buffer {
 public:
  explicit Buffer(std::size_t n, T value = T{}, bool writable = true) : data_(n, value) {
    register_buffer(data_.data(), n * sizeof(T), writable);
  }
  T* data() {
    return data_.data();
  }
  T& operator[](std::size_t i) {
    return data_[i];
  }

 private:
  std::vector<T> data_;
};

inline Grid grid(unsigned threads, unsigned shared_bytes = 0, unsigned blocks = 1) {
  return {"test", blocks, 1, 1, threads, shared_bytes, nullptr};
}

// The launch must fault, and the message hold every one of `words`.
template <typename F>
void expect_fault(const F& run, const std::string& what, std::initializer_list<const char*> words) {
  std::string message;
  try {
    run();
  } catch (const Fault& f) {
    message = f.what();
  }
  for (const char* word : words) {
    expect(message.find(word) != std::string::npos,
           what + ": the message lacks \"" + word + "\": " + (message.empty() ? "(no fault)" : message));
  }
  std::printf("%s: %s\n", what.c_str(), message.c_str());
}

void test_pointers();
void test_places();
void test_numbers();
void test_shared();
void test_global();
void test_copies();
void test_warp();
void test_mma();
void test_machine();
void test_traffic();
void test_races();

}  // namespace sparseprune::simt::test
