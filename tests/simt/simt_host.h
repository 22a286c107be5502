// The host twins of csrc/cuda/simt.h, which includes this file where SPARSEPRUNE_SIMT is defined: kernels run as C++, a
// fiber a thread, and every access of memory is checked. A breach of a rule ends the launch with a Fault, which names the
// rule, the line, the kernel, block and thread, and the seed of the order in which threads ran.
//
// What is checked: bounds, alignment and writability of buffers (those registered, host/memory.h); shared memory: bounds,
// alignment, reads of what nobody wrote; both: accesses by two threads, one of them a write, with no barrier between them;
// cp.async: lands at the wait, touched before, never waited for; metadata of mma.sp; all lanes in every collective, all
// threads in every barrier; the limits of a launch. Bank conflicts and sectors are counted (host/report.h).
#pragma once

#include <bit>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "host/machine.h"
#include "host/memory.h"
#include "host/pointers.h"
#include "host/report.h"
#include "host/warp.h"

#define SP_KERNEL void
#define SP_THREADS(threads, blocks)
#define SP_DEVICE inline
#define SP_UNROLL
#define SP_ROLL

namespace sparseprune::simt {

inline unsigned thread_x() {
  return machine.self->id;
}
inline unsigned block_x() {
  return machine.block_x;
}
inline unsigned block_y() {
  return machine.block_y;
}
inline unsigned block_z() {
  return machine.block_z;
}
inline unsigned grid_x() {
  return machine.grid_x;
}
inline unsigned grid_y() {
  return machine.grid_y;
}
inline unsigned block_threads() {
  return machine.threads;
}
inline unsigned lane() {
  return machine.self->lane;
}
inline unsigned warp() {
  return machine.self->warp;
}

template <typename T>
Shared<T> shared_memory(unsigned byte_offset) {
  return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(machine.shared) + byte_offset);
}

// Where the dynamic shared memory of a block begins: not at 0, and 128-byte aligned, no more is promised.
inline unsigned shared_base() {
  return 1024 + 128;
}
template <typename T>
Shared<T> shared_at(unsigned a) {
  return shared_memory<T>(a - shared_base());
}

template <typename V>
concept Loadable = std::is_trivially_copyable_v<V> && std::has_single_bit(sizeof(V)) && sizeof(V) <= 16;

template <Loadable V, typename T>
V load(const Global<T>& p, const Location& at = Location::current()) {
  return p.template get<V>(sizeof(V), at);
}
template <Loadable V, typename T>
V load(const Shared<T>& p, const Location& at = Location::current()) {
  return p.template get<V>(sizeof(V), at);
}
template <Loadable V, typename T>
void store(const Global<T>& p, const V& v, const Location& at = Location::current()) {
  p.set(v, sizeof(V), at);
}
template <Loadable V, typename T>
void store(const Shared<T>& p, const V& v, const Location& at = Location::current()) {
  p.set(v, sizeof(V), at);
}

template <Loadable V, typename T>
V load_stream(const Global<T>& p, const Location& at = Location::current()) {
  read_global_once(p.extent(), p.address(), sizeof(V), sizeof(V), at);
  V v;
  std::memcpy(&v, p.address(), sizeof(V));
  return v;
}

template <typename D, typename S>
void cp_async16(const Shared<D>& dst, const Global<S>& src, int bytes, const Location& at = Location::current()) {
  issue_copy(dst.address(), src.extent(), src.address(), bytes, at);
}
inline void cp_async_commit() {
  ++machine.self->groups;
}
template <int N>
void cp_async_wait() {
  static_assert(N >= 0);
  land_copies(N);
}

template <typename T>
void ldmatrix_x4(std::uint32_t (&r)[4], const Shared<T>& p, const Location& at = Location::current()) {
  warp_ldmatrix_x4(r, p.address(), at);
}
template <typename T>
void ldmatrix_x2(std::uint32_t (&r)[2], const Shared<T>& p, const Location& at = Location::current()) {
  warp_ldmatrix_x2(r, p.address(), at);
}

namespace detail {
template <typename T>
constexpr Half half_of() {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "bf16 or f16");
  return std::is_same_v<T, bf16> ? Half::bf16 : Half::f16;
}
}  // namespace detail

template <typename T, int F>
void mma_sp_m16n8k32(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4], std::uint32_t e,
                     const Location& at = Location::current()) {
  static_assert(F == 0 || F == 1, "m16n8k32 has two selectors");
  warp_mma_sp_m16n8k32(detail::half_of<T>(), F, c, a, b, e, at);
}
template <typename T>
void mma_m16n8k16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                  const Location& at = Location::current()) {
  warp_mma_m16n8k16(detail::half_of<T>(), c, a, b, at);
}

inline void sync_block(const Location& at = Location::current()) {
  join_block(at);
}
inline void sync_warp(const Location& at = Location::current()) {
  warp_sync(at);
}

template <typename T>
T shuffle(T v, int from, const Location& at = Location::current()) {
  return std::bit_cast<T>(warp_shuffle(Shuffle::from, std::bit_cast<std::uint32_t>(v), static_cast<unsigned>(from), at));
}
template <typename T>
T shuffle_xor(T v, int mask, const Location& at = Location::current()) {
  return std::bit_cast<T>(
      warp_shuffle(Shuffle::exclusive_or, std::bit_cast<std::uint32_t>(v), static_cast<unsigned>(mask), at));
}
template <typename T>
T shuffle_up(T v, unsigned delta, const Location& at = Location::current()) {
  return std::bit_cast<T>(warp_shuffle(Shuffle::up, std::bit_cast<std::uint32_t>(v), delta, at));
}
inline std::uint32_t ballot(bool p, const Location& at = Location::current()) {
  return warp_ballot(p, at);
}

inline void atomic_min(const Global<std::int64_t>& p, std::int64_t v, const Location& at = Location::current()) {
  atomic_global(p.extent(), p.address(), 8, 8, at);
  if (v < *p.address()) *p.address() = v;
}
inline void atomic_add(const Global<std::int64_t>& p, std::int64_t v, const Location& at = Location::current()) {
  atomic_global(p.extent(), p.address(), 8, 8, at);
  *p.address() = static_cast<std::int64_t>(static_cast<std::uint64_t>(*p.address()) + static_cast<std::uint64_t>(v));
}

inline int popc(std::uint32_t v) {
  return std::popcount(v);
}
inline int popc(std::uint64_t v) {
  return std::popcount(v);
}

// lop3 with the table 0xea.
inline std::uint32_t and_or(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  return (a & b) | c;
}

// fma.rn.bf16x2 and fma.rn.f16x2.
template <typename T>
std::uint32_t fma2(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  const auto one = [&](int shift) {
    const auto at = [&](std::uint32_t v) { return static_cast<std::uint16_t>(v >> shift); };
    return static_cast<std::uint32_t>(half_fma(detail::half_of<T>(), at(a), at(b), at(c))) << shift;
  };
  return one(0) | one(16);
}

// dp4a.u32.u32 and prmt's default mode, written from the PTX ISA.
inline std::uint32_t dot4(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255u) * (b >> i & 255u);
  return c;
}
inline std::uint32_t byte_perm(std::uint32_t a, std::uint32_t b, std::uint32_t s) {
  const std::uint64_t bytes = std::uint64_t{b} << 32 | a;
  std::uint32_t d = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const std::uint32_t selector = s >> (4 * i) & 15;
    std::uint32_t byte = static_cast<std::uint32_t>(bytes >> (8 * (selector & 7))) & 0xff;
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
    d |= byte << (8 * i);
  }
  return d;
}

inline float to_float(float v) {
  return v;
}
inline float to_float(bf16 v) {
  return half_to_float(Half::bf16, v.bits);
}
inline float to_float(f16 v) {
  return half_to_float(Half::f16, v.bits);
}
template <typename T>
T from_float(float f) {
  if constexpr (std::is_same_v<T, float>) {
    return f;
  } else {
    return {half_from_float(detail::half_of<T>(), f)};
  }
}

// Throws Fault where the kernel breaks a rule.
template <typename... P, typename... A>
int launch(const Grid& grid, void (*kernel)(P...), A... args) {
  struct Bound {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } bound{kernel, {static_cast<P>(args)...}};
  run(grid, {[](void* p) {
               auto& b = *static_cast<Bound*>(p);
               std::apply(b.kernel, b.args);
             },
             &bound});
  return 0;
}

}  // namespace sparseprune::simt
