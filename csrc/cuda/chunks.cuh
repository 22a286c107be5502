// The chunks of 2:4 weights: 4 columns of a row, two of which are kept.
#pragma once

#include <cstdint>

namespace sparseprune::cuda {

// The nibble of a chunk (lower | higher << 2, the places of its two) by which of its places are kept, 4 bits each: filled up
// to two at the lowest free places, and of more the two lowest.
constexpr std::uint64_t make_nibbles() {
  std::uint64_t table = 0;
  for (unsigned kept = 0; kept < 16; ++kept) {
    unsigned places = kept;
    if (places == 0) places = 3;
    if ((places & (places - 1)) == 0) places |= places + 1;
    unsigned lower = 0;
    while ((places >> lower & 1u) == 0) ++lower;
    unsigned higher = lower + 1;
    while ((places >> higher & 1u) == 0) ++higher;
    table |= std::uint64_t{lower | higher << 2} << (4 * kept);
  }
  return table;
}
constexpr std::uint64_t kNibbles = make_nibbles();
static_assert(kNibbles == 0x498e'4dcc'4988'4444ull);

}  // namespace sparseprune::cuda
