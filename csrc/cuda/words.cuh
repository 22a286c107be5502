// A warp's piece of a row, for masks and conversions. Elements are words W of 16 or 32 bits: moved and compared as bits, so
// that every pattern survives.
//
//   elements   0 .. E-1     E .. 2E-1    ...   31E .. 32E-1      E = kLane<W>: 8 words of 16 bits, 4 of 32
//   lane          0             1        ...        31           16 bytes each, one access
//
// So a lane's zero tests are a byte (a nibble) of the bitmask, and an element's rank is a sum over the lanes below and a
// popcount. A whole piece of a row that begins at 16 bytes is read and written directly. Any other (a row's end, rows of odd
// length) goes word by word, neighbouring lanes at neighbouring words, through shared memory that belongs to the warp alone:
// what follows sees one distribution only.
#pragma once

#include <cstdint>

#include "cuda/launchers.h"
#include "cuda/simt.h"

namespace sparseprune::cuda {

using namespace simt;

constexpr int kWarps = 8;  // in a block: 4 to 8 blocks fill an SM, and a row of 4096 words of 16 bits is one turn of a block
constexpr int kThreads = 32 * kWarps;

template <typename W>
constexpr int kLane = 16 / static_cast<int>(sizeof(W));
template <typename W>
constexpr int kPiece = 32 * kLane<W>;
constexpr unsigned kPieceBytes = 512;

SP_DEVICE int lane_id() {
  return static_cast<int>(lane());
}

// Elements from the last multiple of 16 bytes to p.
template <typename T>
int shift_of(const T* p) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(p) % 16 / sizeof(T));
}
// Whether element `index` of an array with that shift lies at `each` elements, a power of two.
SP_DEVICE bool is_aligned(int shift, std::int64_t index, int each) {
  return ((shift + index) & (each - 1)) == 0;
}

// The lane's elements of V: of a whole piece at a multiple of 16 bytes (of sizeof(V)), of any piece (zero from `left` on),
// and by what it is. stage: 32 V, the warp's own.
template <typename V, typename T>
SP_DEVICE V load_whole(Global<const T> p) {
  constexpr int each = static_cast<int>(sizeof(V) / sizeof(T));
  return load<V>(p + lane_id() * each);
}
template <typename V, typename T>
SP_DEVICE V load_staged(Global<const T> p, std::int64_t left, Shared<T> stage) {
  constexpr int each = static_cast<int>(sizeof(V) / sizeof(T));
  SP_UNROLL
  for (int j = 0; j < each; ++j) {
    const int i = 32 * j + lane_id();
    T word{};
    if (i < left) word = load<T>(p + i);
    store(stage + i, word);
  }
  sync_warp();
  const V v = load<V>(stage + lane_id() * each);
  sync_warp();  // the stage may be written again
  return v;
}
template <typename V, typename T>
SP_DEVICE V load_piece(Global<const T> p, std::int64_t left, bool aligned, Shared<T> stage) {
  if (left <= 0) return V{};
  if (aligned && left >= static_cast<int>(32 * sizeof(V) / sizeof(T))) return load_whole<V>(p);
  return load_staged<V>(p, left, stage);
}

template <typename V, typename T>
SP_DEVICE void store_whole(Global<T> p, const V& v) {
  constexpr int each = static_cast<int>(sizeof(V) / sizeof(T));
  store(p + lane_id() * each, v);
}
template <typename V, typename T>
SP_DEVICE void store_staged(Global<T> p, const V& v, std::int64_t left, Shared<T> stage) {
  constexpr int each = static_cast<int>(sizeof(V) / sizeof(T));
  store(stage + lane_id() * each, v);
  sync_warp();
  SP_UNROLL
  for (int j = 0; j < each; ++j) {
    const int i = 32 * j + lane_id();
    if (i < left) store(p + i, load<T>(stage + i));
  }
  sync_warp();  // the stage may be written again
}
template <typename V, typename T>
SP_DEVICE void store_piece(Global<T> p, const V& v, std::int64_t left, bool aligned, Shared<T> stage) {
  if (left <= 0) return;
  if (aligned && left >= static_cast<int>(32 * sizeof(V) / sizeof(T))) {
    store_whole(p, v);
  } else {
    store_staged(p, v, left, stage);
  }
}

template <typename W>
SP_DEVICE W element(const u32x4& v, int e) {
  const std::uint32_t w[4] = {v.x, v.y, v.z, v.w};
  if constexpr (sizeof(W) == 4) {
    return w[e];
  } else {
    return static_cast<W>(w[e / 2] >> (16 * (e % 2)));
  }
}

// Bit e: the magnitude of element e is above cut. cut 0: all but zeros.
template <typename W>
SP_DEVICE unsigned above(const u32x4& v, int cut) {
  constexpr W magnitude = static_cast<W>(static_cast<W>(~W{0}) >> 1);
  unsigned bits = 0;
  SP_UNROLL
  for (int e = 0; e < kLane<W>; ++e)
    bits |= static_cast<unsigned>(static_cast<int>(element<W>(v, e) & magnitude) > cut) << e;
  return bits;
}

// v where a bit is set, else +0.0.
template <typename W>
SP_DEVICE u32x4 keep(const u32x4& v, unsigned bits) {
  std::uint32_t w[4] = {v.x, v.y, v.z, v.w};
  SP_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(W) == 4) {
      w[i] &= 0u - (bits >> i & 1u);
    } else {
      const std::uint32_t low = 0u - (bits >> (2 * i) & 1u), high = 0u - (bits >> (2 * i + 1) & 1u);
      w[i] &= (low & 0xffffu) | high << 16;
    }
  }
  return {w[0], w[1], w[2], w[3]};
}

// A row's bitmask, from the piece's first byte on; `left` elements to the row's end.
template <typename W>
SP_DEVICE unsigned load_bits(Global<const std::uint8_t> bits, std::int64_t left) {
  const int first = lane_id() * kLane<W>;
  if (first >= left) return 0;
  const unsigned byte = load<std::uint8_t>(bits + first / 8);
  return kLane<W> == 8 ? byte : byte >> (first % 8) & 15u;
}
template <typename W>
SP_DEVICE void store_bits(Global<std::uint8_t> bits, unsigned own, std::int64_t left) {
  if constexpr (kLane<W> == 4) own |= shuffle_xor(own, 1) << 4;  // in the even lanes, which store
  const int first = lane_id() * kLane<W>;
  if (first % 8 == 0 && first < left) store(bits + first / 8, static_cast<std::uint8_t>(own));
}

// Sum over the lanes up to this one.
SP_DEVICE int inclusive_sum(int v) {
  SP_UNROLL
  for (int delta = 1; delta < 32; delta *= 2) {
    const int below = shuffle_up(v, static_cast<unsigned>(delta));
    if (lane_id() >= delta) v += below;
  }
  return v;
}

// This warp among all of the grid, and their number: for loops over tasks that grid.x may not be able to count.
SP_DEVICE std::int64_t first_task() {
  return static_cast<std::int64_t>(block_x()) * kWarps + static_cast<int>(warp());
}
SP_DEVICE std::int64_t task_step() {
  return static_cast<std::int64_t>(grid_x()) * kWarps;
}

inline unsigned blocks_for(std::int64_t tasks, std::int64_t per_block) {
  const std::int64_t blocks = ceil_div(tasks, per_block);
  return static_cast<unsigned>(blocks < INT32_MAX ? blocks : INT32_MAX);
}

template <typename W>
constexpr const char* by_width(const char* name16, const char* name32) {
  return sizeof(W) == 2 ? name16 : name32;
}

}  // namespace sparseprune::cuda
