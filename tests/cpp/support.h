// What the sanitizers' programs share: counted checks, exact buffers, values of a dtype.
//
// Buffers are exactly as large as their contract says, in two ways. Heap: AddressSanitizer's red zones catch each
// compiled load and store, byte by byte, before and after. Pages: the buffer ends at an unreadable page, which also
// catches what the sanitizer does not see: masked vector instructions, gathers, and AMX tile loads.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/layouts/geometry.h"

namespace sparseprune {
namespace {

std::int64_t passed = 0, failed = 0;
std::string context;

void expect(bool ok, const char* what) {
  ++(ok ? passed : failed);
  if (!ok && failed <= 20) std::printf("FAILED: %s: %s\n", context.c_str(), what);
}

enum class Place { heap, pages };

// `bytes` bytes, aligned to `align`, filled with 0xa5 so that what a kernel does not write shows.
class Memory {
 public:
  Memory(Place place, std::int64_t bytes, std::int64_t align) : place_(place), bytes_(static_cast<std::size_t>(bytes)) {
    if (place == Place::heap) {
      void* p = nullptr;
      if (posix_memalign(&p, std::max<std::size_t>(sizeof(void*), static_cast<std::size_t>(align)), bytes_) != 0)
        std::abort();
      data_ = static_cast<char*>(p);
    } else {
      const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
      // The end is rounded down to the alignment: up to align - 1 bytes past it are readable.
      const std::size_t rounded = static_cast<std::size_t>(round_up(bytes, align));
      mapped_ = (rounded + page - 1) / page * page + page;
      void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (p == MAP_FAILED) std::abort();
      base_ = static_cast<char*>(p);
      if (mprotect(base_ + mapped_ - page, page, PROT_NONE) != 0) std::abort();
      data_ = base_ + mapped_ - page - rounded;
    }
    if (bytes_) std::memset(data_, 0xa5, bytes_);
  }
  Memory(Memory&& other) noexcept
      : place_(other.place_), bytes_(other.bytes_), mapped_(other.mapped_), data_(other.data_), base_(other.base_) {
    other.data_ = other.base_ = nullptr;
  }
  Memory& operator=(Memory&&) = delete;
  ~Memory() {
    if (place_ == Place::heap) {
      std::free(data_);
    } else if (base_) {
      munmap(base_, mapped_);
    }
  }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  bool equals(const void* other) const {
    return bytes_ == 0 || std::memcmp(data_, other, bytes_) == 0;
  }

 private:
  Place place_;
  std::size_t bytes_, mapped_ = 0;
  char *data_, *base_ = nullptr;
};

template <typename T>
Memory copy_of(Place place, const std::vector<T>& v) {
  Memory m(place, static_cast<std::int64_t>(v.size() * sizeof(T)), sizeof(T));
  if (!v.empty()) std::memcpy(m.as<char>(), v.data(), v.size() * sizeof(T));
  return m;
}

// Values of a dtype that are small whole numbers, and back.
std::uint32_t encode(DType dtype, float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (dtype == DType::f32) return bits;
  if (dtype == DType::bf16) return bits >> 16;
  if ((bits & 0x7fffffffu) == 0) return bits >> 16;
  return (bits >> 16 & 0x8000u) | ((bits & 0x7fffffffu) - 0x38000000u) >> 13;
}
double decode(DType dtype, const void* p) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, p, size_of(dtype));
  if (dtype == DType::bf16) bits <<= 16;
  if (dtype == DType::f16) {
    const std::uint32_t magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
    bits = magnitude >= 0x7c00u ? sign | 0x7f800000u | magnitude << 13
           : magnitude == 0     ? sign
                                : sign | ((magnitude << 13) + 0x38000000u);
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
double unit_roundoff(DType dtype) {
  return dtype == DType::f32 ? 0 : dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
}

struct Random {
  std::mt19937_64 engine{12345};
  std::int64_t below(std::int64_t n) {
    return static_cast<std::int64_t>(engine() % static_cast<std::uint64_t>(n));
  }
  float whole(int limit) {
    const float x = static_cast<float>(1 + below(limit));
    return below(2) ? x : -x;
  }
};
Random random_source;

}  // namespace
}  // namespace sparseprune
