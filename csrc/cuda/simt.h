// All that a kernel does which is not plain C++, one name each. A kernel's body is compiled twice: by nvcc, where these
// names are PTX, and by the host compiler, where tests/simt/simt_host.h emulates them and checks every access.
//
// So a kernel touches memory only through Global<T> and Shared<T> (or load and store), asks for its place only by the
// functions below, and declares no static shared memory. Names that only one side has are not part of the contract.
//
//   SP_KERNEL                       in the place of __global__ void; SP_THREADS(n, blocks) its launch bounds; before loops:
//                                   SP_UNROLL, or SP_ROLL where copies of a rarely run body would cost others registers
//   thread_x() block_x() block_y() block_z() grid_x() grid_y() block_threads() lane() warp()
//   Global<T>, Shared<T>            pointers: p[i], p + i, p - q, if (p), reinterpret<U>(p)
//   shared_memory<T>(byte_offset)   into the block's dynamic shared memory, 128-byte aligned
//   shared_at<T>(a)                 the same, a being shared_base() + byte_offset: nothing is left to add where a kernel
//                                   counts with such an a, while the base alone is several instructions, wherever needed
//   load<V>(p), store(p, v)         V of 1 to 16 bytes (u32x2, u32x4, ...), p aligned to sizeof(V); one instruction
//   load_stream<V>(p)               load from global memory what is read once: past L1
//   cp_async16(dst, src, bytes)     16 bytes, global to shared, of which the first `bytes` (0 to 16) are read and the rest
//                                   is zero; src is not looked at for bytes = 0. It lands at the wait, and other threads
//                                   see it after a barrier more
//   cp_async_commit(), cp_async_wait<N>()   until at most the N youngest groups of this thread are under way
//   ldmatrix_x4(r, p)               lane L gives the 16-byte row L%8 of matrix L/8 (shared, aligned); r[j] of lane L is
//                                   elements 2(L%4), 2(L%4)+1 of row L/4 of matrix j.  ldmatrix_x2: lanes 0 to 15
//   mma_sp_m16n8k32<T, F>(c, a, b, e)   mma.sp::ordered_metadata, f32 += T x T, sparsity selector F
//   mma_m16n8k16<T>(c, a, b)        dense mma, f32 += T x T
//   sync_block(), sync_warp()       barriers; all threads of the block, all 32 lanes
//   shuffle(v, lane), shuffle_xor(v, mask), shuffle_up(v, delta), ballot(p)    all 32 lanes take part
//   atomic_min(p, v), atomic_add(p, v)  global memory, relaxed
//   popc(u32), popc(u64), to_float(T), from_float<T>(f)    f to nearest even, NaN stays NaN
//   and_or(a, b, c)                 (a & b) | c in one instruction, which two constants would otherwise make two
//   fma2<T>(a, b, c)                a * b + c of the two T in each word, each rounded once, to nearest even
//   dot4(a, b, c)                   c plus the sum of the products of the four bytes of a and b, unsigned (dp4a)
//   byte_perm(a, b, s)              PTX prmt: byte i of the result is byte (s >> 4i) & 7 of a (0 to 3) and b (4 to 7), or,
//                                   with bit 3 of that nibble, its sign eight times; bits 16 and up of s do not matter
//   launch(grid, kernel, args...)   0 or the error's code
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"

namespace sparseprune::simt {

struct alignas(8) u32x2 {
  std::uint32_t x, y;
};
struct alignas(16) u32x4 {
  std::uint32_t x, y, z, w;
};

struct Grid {
  const char* name;  // the kernel's, for the emulator's reports
  unsigned x, y, z;
  unsigned threads;
  unsigned shared_bytes;
  void* stream;
};

}  // namespace sparseprune::simt

#if defined(SPARSEPRUNE_SIMT)
#include "simt_host.h"
#else

#include <cuda_runtime.h>

#define SP_KERNEL __global__ void
#define SP_THREADS(threads, blocks) __launch_bounds__(threads, blocks)
#define SP_DEVICE __device__ __forceinline__
#define SP_UNROLL _Pragma("unroll")
#define SP_ROLL _Pragma("unroll 1")

namespace sparseprune::simt {

template <typename T>
using Global = T*;
template <typename T>
using Shared = T*;

template <typename U, typename T>
SP_DEVICE U* reinterpret(T* p) {
  return reinterpret_cast<U*>(p);
}

SP_DEVICE unsigned thread_x() {
  return threadIdx.x;
}
SP_DEVICE unsigned block_x() {
  return blockIdx.x;
}
SP_DEVICE unsigned block_y() {
  return blockIdx.y;
}
SP_DEVICE unsigned block_z() {
  return blockIdx.z;
}
SP_DEVICE unsigned grid_x() {
  return gridDim.x;
}
SP_DEVICE unsigned grid_y() {
  return gridDim.y;
}
SP_DEVICE unsigned block_threads() {
  return blockDim.x;
}
SP_DEVICE unsigned lane() {
  return threadIdx.x % 32;
}
SP_DEVICE unsigned warp() {
  return threadIdx.x / 32;
}

extern __shared__ __align__(128) unsigned char simt_shared[];

template <typename T>
SP_DEVICE T* shared_memory(unsigned byte_offset) {
  return reinterpret_cast<T*>(simt_shared + byte_offset);
}

SP_DEVICE unsigned shared_base() {
  return static_cast<unsigned>(__cvta_generic_to_shared(simt_shared));
}
template <typename T>
SP_DEVICE T* shared_at(unsigned a) {
  return reinterpret_cast<T*>(simt_shared + (a - shared_base()));  // not by cvta: on that nvcc 13.0 does not end
}

// The built-in vectors, because a struct of scalars may be read word by word.
namespace detail {
template <typename V>
struct Native {
  using type = V;
};
template <>
struct Native<u32x2> {
  using type = uint2;
};
template <>
struct Native<u32x4> {
  using type = uint4;
};
}  // namespace detail

template <typename V, typename T>
SP_DEVICE V load(const T* p) {
  const auto v = *reinterpret_cast<const typename detail::Native<V>::type*>(p);
  if constexpr (std::is_same_v<V, u32x4>) {
    return {v.x, v.y, v.z, v.w};
  } else if constexpr (std::is_same_v<V, u32x2>) {
    return {v.x, v.y};
  } else {
    return v;
  }
}

// By PTX: nvcc may write the words of a built-in vector one by one. The compiler knows which memory p is in and keeps one of
// the two.
template <typename V, typename T>
SP_DEVICE void store(T* p, const V& v) {
  if constexpr (std::is_same_v<V, u32x4>) {
    if (__isShared(p)) {
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_shared(p)), "r"(v.x), "r"(v.y),
                   "r"(v.z), "r"(v.w)
                   : "memory");
    } else {
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y),
                   "r"(v.z), "r"(v.w)
                   : "memory");
    }
  } else if constexpr (std::is_same_v<V, u32x2>) {
    if (__isShared(p)) {
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_shared(p)), "r"(v.x), "r"(v.y) : "memory");
    } else {
      asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y) : "memory");
    }
  } else {
    *reinterpret_cast<V*>(p) = v;
  }
}

template <typename V, typename T>
SP_DEVICE V load_stream(const T* p) {
  if constexpr (std::is_same_v<V, u32x4>) {
    V v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
  } else if constexpr (std::is_same_v<V, u32x2>) {
    V v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
  } else {
    return __ldg(reinterpret_cast<const V*>(p));
  }
}

SP_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

template <typename D, typename S>
SP_DEVICE void cp_async16(D* dst, const S* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src), "r"(bytes) : "memory");
}
SP_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
SP_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

template <typename T>
SP_DEVICE void ldmatrix_x4(std::uint32_t (&r)[4], const T* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}
template <typename T>
SP_DEVICE void ldmatrix_x2(std::uint32_t (&r)[2], const T* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(p))
               : "memory");
}

template <typename T, int F>
SP_DEVICE void mma_sp_m16n8k32(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4], std::uint32_t e) {
  static_assert(F == 0 || F == 1, "m16n8k32 has two selectors");
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e), "n"(F));
  } else {
    static_assert(std::is_same_v<T, f16>, "bf16 or f16");
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e), "n"(F));
  }
}

template <typename T>
SP_DEVICE void mma_m16n8k16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, f16>, "bf16 or f16");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

SP_DEVICE void sync_block() {
  __syncthreads();
}
SP_DEVICE void sync_warp() {
  __syncwarp();
}

// T of 4 bytes
template <typename T>
SP_DEVICE T shuffle(T v, int from) {
  return __shfl_sync(~0u, v, from);
}
template <typename T>
SP_DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(~0u, v, mask);
}
// A lane below delta keeps its own.
template <typename T>
SP_DEVICE T shuffle_up(T v, unsigned delta) {
  return __shfl_up_sync(~0u, v, delta);
}
SP_DEVICE std::uint32_t ballot(bool p) {
  return __ballot_sync(~0u, p);
}

SP_DEVICE void atomic_min(std::int64_t* p, std::int64_t v) {
  atomicMin(reinterpret_cast<long long*>(p), static_cast<long long>(v));
}
SP_DEVICE void atomic_add(std::int64_t* p, std::int64_t v) {
  atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}

SP_DEVICE int popc(std::uint32_t v) {
  return __popc(v);
}
SP_DEVICE int popc(std::uint64_t v) {
  return __popcll(v);
}

SP_DEVICE std::uint32_t byte_perm(std::uint32_t a, std::uint32_t b, std::uint32_t s) {
  std::uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(s));
  return d;
}

SP_DEVICE std::uint32_t dot4(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  return __dp4a(a, b, c);
}

SP_DEVICE std::uint32_t and_or(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <typename T>
SP_DEVICE std::uint32_t fma2(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t d;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    static_assert(std::is_same_v<T, f16>, "bf16 or f16");
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
}

SP_DEVICE float to_float(float v) {
  return v;
}
SP_DEVICE float to_float(bf16 v) {
  return __uint_as_float(static_cast<unsigned>(v.bits) << 16);
}
SP_DEVICE float to_float(f16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
template <typename T>
SP_DEVICE T from_float(float f) {
  if constexpr (std::is_same_v<T, float>) {
    return f;
  } else if constexpr (std::is_same_v<T, bf16>) {
    T v;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
    return v;
  } else {
    T v;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
    return v;
  }
}

template <typename... P, typename... A>
int launch(const Grid& grid, void (*kernel)(P...), A... args) {
  if (grid.shared_bytes > 48 * 1024) {
    // More than every card has must be asked for. No stream operation: legal while a graph is captured.
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(grid.shared_bytes));
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(grid.stream);
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...));
}

}  // namespace sparseprune::simt

#endif
