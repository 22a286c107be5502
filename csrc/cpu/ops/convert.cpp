#include "cpu/ops/convert.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/layouts/geometry.h"
#include "cpu/dispatch/isa.h"
#include "cpu/ops/parallel.h"

namespace sparseprune {
namespace {

const WordKernels& words_of(DType dtype) {
  return size_of(dtype) == 2 ? kernels().words16 : kernels().words32;
}

// Element `i` of an array of `dtype`.
const char* at(const void* p, DType dtype, std::int64_t i) {
  return static_cast<const char*>(p) + i * static_cast<std::int64_t>(size_of(dtype));
}
char* at(void* p, DType dtype, std::int64_t i) {
  return static_cast<char*>(p) + i * static_cast<std::int64_t>(size_of(dtype));
}

// offsets[r + 1] holds row r's count: make it the running sum.
std::int64_t running_sum(std::int64_t rows, std::int64_t* offsets) {
  offsets[0] = 0;
  for (std::int64_t r = 0; r < rows; ++r) offsets[r + 1] += offsets[r];
  return offsets[rows];
}

// The smallest of what threads report; `none` if nobody does.
void keep_smallest(std::atomic<std::int64_t>& place, std::int64_t value) {
  std::int64_t seen = place.load();
  while (value < seen && !place.compare_exchange_weak(seen, value)) {
  }
}
constexpr std::int64_t kNone = INT64_MAX;

unsigned group_bits(const std::uint8_t* row, std::int64_t first, int count) {
  unsigned bits = 0;
  for (int j = 0; j < count; ++j) bits |= (row[(first + j) / 8] >> ((first + j) % 8) & 1u) << j;
  return bits;
}

}  // namespace

std::int64_t scan_dense(const Matrix& m, const void* dense, std::uint8_t* bits, std::int64_t* offsets, int threads) {
  const WordKernels& w = words_of(m.dtype);
  const std::int64_t stride = ceil_div(m.cols, 8);
  parallel_for(m.rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      offsets[r + 1] = w.scan(at(dense, m.dtype, r * m.cols), bits + r * stride, m.cols);
    }
  });
  return running_sum(m.rows, offsets);
}

std::int64_t count_dense(const Matrix& m, const void* dense, std::int64_t* offsets, int threads) {
  const WordKernels& w = words_of(m.dtype);
  parallel_for(m.rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) offsets[r + 1] = w.count(at(dense, m.dtype, r * m.cols), m.cols);
  });
  return running_sum(m.rows, offsets);
}

bool fill_groups(std::int64_t rows, std::int64_t cols, int n, int m_group, std::uint8_t* bits, GroupError* error,
                 int threads) {
  const std::int64_t stride = ceil_div(cols, 8), groups = cols / m_group;
  std::atomic<std::int64_t> bad{kNone};
  parallel_for(rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      std::uint8_t* row = bits + r * stride;
      for (std::int64_t g = 0; g < groups; ++g) {
        const unsigned kept = group_bits(row, g * m_group, m_group);
        int missing = n - __builtin_popcount(kept);
        if (missing < 0) keep_smallest(bad, r * groups + g);
        for (int j = 0; missing > 0; ++j) {
          if (kept >> j & 1u) continue;
          const std::int64_t c = g * m_group + j;
          row[c / 8] = static_cast<std::uint8_t>(row[c / 8] | 1u << (c % 8));
          --missing;
        }
      }
    }
  });
  if (bad == kNone) return true;
  const std::int64_t row = bad / groups, group = bad % groups;
  *error = {row, group, __builtin_popcount(group_bits(bits + row * stride, group * m_group, m_group))};
  return false;
}

std::int64_t count_bits(std::int64_t rows, std::int64_t cols, const std::uint8_t* bits, std::int64_t* offsets, int threads) {
  const std::int64_t stride = ceil_div(cols, 8);
  const unsigned padding = cols % 8 == 0 ? 0u : 0xffu << (cols % 8) & 0xffu;
  std::atomic<std::int64_t> bad{kNone};
  parallel_for(rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::uint8_t* row = bits + r * stride;
      std::int64_t kept = 0, i = 0;
      for (; i + 8 <= stride; i += 8) {
        std::uint64_t word;
        std::memcpy(&word, row + i, 8);
        kept += __builtin_popcountll(word);
      }
      for (; i < stride; ++i) kept += __builtin_popcount(row[i]);
      offsets[r + 1] = kept;
      if (stride > 0 && (row[stride - 1] & padding) != 0) keep_smallest(bad, r);
    }
  });
  if (bad != kNone) return -1 - bad;
  return running_sum(rows, offsets);
}

void compress_dense(const Matrix& m, const void* dense, const std::uint8_t* bits, const std::int64_t* offsets, void* values,
                    int threads) {
  const WordKernels& w = words_of(m.dtype);
  const std::int64_t stride = ceil_div(m.cols, 8);
  parallel_for(m.rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      w.compress(at(dense, m.dtype, r * m.cols), bits + r * stride, at(values, m.dtype, offsets[r]), m.cols);
    }
  });
}

void expand_dense(const Matrix& m, const void* values, const std::uint8_t* bits, const std::int64_t* offsets, void* dense,
                  int threads) {
  const WordKernels& w = words_of(m.dtype);
  const std::int64_t stride = ceil_div(m.cols, 8);
  parallel_for(m.rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      w.expand(at(values, m.dtype, offsets[r]), bits + r * stride, at(dense, m.dtype, r * m.cols), m.cols);
    }
  });
}

void dense_to_csr(const Matrix& m, const void* dense, const std::int64_t* crow, std::int32_t* col, void* values,
                  int threads) {
  const WordKernels& w = words_of(m.dtype);
  parallel_for(m.rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      w.csr_row(at(dense, m.dtype, r * m.cols), col + crow[r], at(values, m.dtype, crow[r]), m.cols);
    }
  });
}

void csr_to_dense(const Matrix& m, const std::int64_t* crow, const std::int32_t* col, std::int64_t nnz, const void* values,
                  void* dense, int threads) {
  if (crow[0] != 0 || crow[m.rows] != nnz) {
    throw std::invalid_argument("crow: must run from 0 to the number of values " + std::to_string(nnz) + ", got " +
                                std::to_string(crow[0]) + " to " + std::to_string(crow[m.rows]));
  }
  // All of crow before any of it is used as an index.
  for (std::int64_t r = 0; r < m.rows; ++r) {
    if (crow[r] > crow[r + 1]) {
      throw std::invalid_argument("crow: must not decrease, but falls from " + std::to_string(crow[r]) + " to " +
                                  std::to_string(crow[r + 1]) + " at row " + std::to_string(r));
    }
  }
  std::atomic<std::int64_t> bad{kNone};
  const std::size_t size = size_of(m.dtype);
  parallel_for(m.rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      char* row = at(dense, m.dtype, r * m.cols);
      std::memset(row, 0, static_cast<std::size_t>(m.cols) * size);
      std::int64_t last = -1;
      for (std::int64_t i = crow[r]; i < crow[r + 1]; ++i) {
        if (col[i] <= last || col[i] >= m.cols) {
          keep_smallest(bad, i);
          break;
        }
        last = col[i];
        std::memcpy(row + last * static_cast<std::int64_t>(size), at(values, m.dtype, i), size);
      }
    }
  });
  if (bad != kNone) {
    throw std::invalid_argument("col: must be ascending within a row and in [0, " + std::to_string(m.cols) + "), got " +
                                std::to_string(col[bad]) + " at position " + std::to_string(bad));
  }
}

void mask_bytes(DType dtype, const void* in, const std::uint8_t* mask, void* out, std::int64_t n, int threads) {
  constexpr std::int64_t kBlock = 16384;
  const WordKernels& w = words_of(dtype);
  parallel_for(ceil_div(n, kBlock), threads, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t first = begin * kBlock, last = end * kBlock < n ? end * kBlock : n;
    w.mask_bytes(at(in, dtype, first), mask + first, at(out, dtype, first), last - first);
  });
}

void mask_bits(const Matrix& m, const void* in, const std::uint8_t* bits, void* out, int threads) {
  const WordKernels& w = words_of(m.dtype);
  const std::int64_t stride = ceil_div(m.cols, 8);
  parallel_for(m.rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      w.mask_bits(at(in, m.dtype, r * m.cols), bits + r * stride, at(out, m.dtype, r * m.cols), m.cols);
    }
  });
}

void threshold(const Matrix& m, const void* in, float limit, void* out, std::uint8_t* bits, int threads) {
  const auto run = kernels().threshold[static_cast<int>(m.dtype)];
  const std::int64_t stride = ceil_div(m.cols, 8);
  parallel_for(m.rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      run(at(in, m.dtype, r * m.cols), limit, at(out, m.dtype, r * m.cols), bits + r * stride, m.cols);
    }
  });
}

void bytes_to_bits(std::int64_t rows, std::int64_t cols, const std::uint8_t* mask, std::uint8_t* bits, int threads) {
  const std::int64_t stride = ceil_div(cols, 8);
  parallel_for(rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      for (std::int64_t i = 0; i < stride; ++i) {
        unsigned byte = 0;
        for (std::int64_t j = 0; j < 8 && 8 * i + j < cols; ++j) byte |= (mask[r * cols + 8 * i + j] != 0) << j;
        bits[r * stride + i] = static_cast<std::uint8_t>(byte);
      }
    }
  });
}

void bits_to_bytes(std::int64_t rows, std::int64_t cols, const std::uint8_t* bits, std::uint8_t* mask, int threads) {
  const std::int64_t stride = ceil_div(cols, 8);
  parallel_for(rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      for (std::int64_t c = 0; c < cols; ++c) mask[r * cols + c] = bits[r * stride + c / 8] >> (c % 8) & 1;
    }
  });
}

}  // namespace sparseprune
