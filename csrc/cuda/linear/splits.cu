// Sum of splits.
//
// Equation        out[n][m] = bias[m] + sum over s of partial[s][n][m], in the order of s.
// Operands        partial: float32 [splits][batch][rows]; bias [rows] or null; out [batch][rows].
// Preconditions   splits, batch, rows >= 1.
// Partition       A thread takes N neighbouring outputs, a warp 32 N; splits are read one after the other, all independent,
//                 so that several are under way.
// Constants       N = 4 makes the reads of partial 16 bytes; small blocks, because a decode's output is 4096 numbers.
#include <cstring>

#include "cuda/launchers.h"
#include "cuda/simt.h"

namespace sparseprune::cuda {
namespace {

constexpr int kThreads = 128;

template <typename T, int N>
SP_DEVICE void read_floats(simt::Global<const T> from, float (&v)[N]) {
  if constexpr (N == 1) {
    v[0] = simt::to_float(simt::load<T>(from));
  } else if constexpr (sizeof(T) == 4) {
    const auto words = simt::load<simt::u32x4>(from);
    std::memcpy(v, &words, sizeof words);
  } else {
    const auto words = simt::load<simt::u32x2>(from);
    T narrow[N];
    std::memcpy(narrow, &words, sizeof words);
    SP_UNROLL
    for (int e = 0; e < N; ++e) v[e] = simt::to_float(narrow[e]);
  }
}

template <typename T, int N>
SP_DEVICE void write_floats(simt::Global<T> to, const float (&v)[N]) {
  T narrow[N];
  SP_UNROLL
  for (int e = 0; e < N; ++e) narrow[e] = simt::from_float<T>(v[e]);
  if constexpr (N == 1) {
    simt::store(to, narrow[0]);
  } else if constexpr (sizeof(T) == 4) {
    simt::u32x4 words;
    std::memcpy(&words, narrow, sizeof words);
    simt::store(to, words);
  } else {
    simt::u32x2 words;
    std::memcpy(&words, narrow, sizeof words);
    simt::store(to, words);
  }
}

template <typename T, int N>
SP_KERNEL SP_THREADS(kThreads, 1) sum_splits_kernel(simt::Global<const float> partial, int splits, std::int64_t size,
                                                    std::int64_t rows, simt::Global<const T> bias, simt::Global<T> out) {
  const std::int64_t at = (static_cast<std::int64_t>(simt::block_x()) * kThreads + simt::thread_x()) * N;
  if (at >= size) return;
  float sum[N] = {}, next[N];
  for (int s = 0; s < splits; ++s) {
    read_floats<float, N>(partial + (s * size + at), next);
    SP_UNROLL
    for (int e = 0; e < N; ++e) sum[e] += next[e];
  }
  if (bias) {
    read_floats<T, N>(bias + at % rows, next);
    SP_UNROLL
    for (int e = 0; e < N; ++e) sum[e] += next[e];
  }
  write_floats<T, N>(out + at, sum);
}

template <typename T, int N>
int run(const float* partial, int splits, std::int64_t batch, std::int64_t rows, const void* bias, void* out, void* stream) {
  const std::int64_t size = batch * rows, blocks = ceil_div(size, kThreads * N);
  return simt::launch({"sum_splits", static_cast<unsigned>(blocks), 1, 1, kThreads, 0, stream}, sum_splits_kernel<T, N>,
                      partial, splits, size, rows, static_cast<const T*>(bias), static_cast<T*>(out));
}

template <typename T>
int run(const float* partial, int splits, std::int64_t batch, std::int64_t rows, const void* bias, void* out, void* stream) {
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  // Rows by four: then no four outputs straddle two batch rows, and every split begins at 16 bytes.
  return rows % 4 == 0 && aligned(partial) && aligned(bias) && aligned(out)
             ? run<T, 4>(partial, splits, batch, rows, bias, out, stream)
             : run<T, 1>(partial, splits, batch, rows, bias, out, stream);
}

}  // namespace

int sum_splits(DType dtype, const float* partial, int splits, std::int64_t batch, std::int64_t rows, const void* bias,
               void* out, void* stream) {
  if (batch == 0 || rows == 0) return 0;
  switch (dtype) {
    case DType::f32: return run<float>(partial, splits, batch, rows, bias, out, stream);
    case DType::bf16: return run<bf16>(partial, splits, batch, rows, bias, out, stream);
    default: return run<f16>(partial, splits, batch, rows, bias, out, stream);
  }
}

}  // namespace sparseprune::cuda
