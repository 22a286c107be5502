// From the bitmaps of a unit (16 rows x 64 columns, core/layouts/bitmap8.h) to the places of its values, by one warp.
//
// Equation       place(bitmap b, bit j) = values of bitmaps 0 .. b - 1, plus the set bits of b below j.
// Operands       Lane L = 4g + t needs, of each of the 16 bitmaps, bits 2L and 2L + 1: pair t of row g. A unit has 4 steps
//                of 4 bitmaps: row g of all bitmaps of a step is 4 bytes, one register; and since fewer than 256 values of a
//                step come before any of its pairs, their counts are 4 bytes as well. All arithmetic is on 4 bitmaps at
//                once, a byte each; no byte overflows into the next.
// Preconditions  All 32 lanes take part.
// Partition      index_unit(): lane 4g + s counts row g of step s, 32 rows of 4 bytes for 32 lanes, and scans over g.
//
//                    lane     0     1     2     3     4     5   ...  31        step 0       step 1      step 2   step 3
//                    row g    0     0     0     0     1     1   ...   7        bitmaps 0-3  4-7         8-11     12-15
//                    step s   0     1     2     3     0     1   ...   3
//
//                step_of(): the quad g passes around what its lane s has, then each lane takes its pair.
// Constants      A popcount per bitmap and lane would run at a quarter of the rate (16 a clock and SM), and a shuffle or a
//                load per bitmap shares one pipe with the loads of values.
#pragma once

#include "core/layouts/bitmap8.h"
#include "cuda/simt.h"

namespace sparseprune::cuda {

// v, as a thing of the lane that cannot be computed again: ptxas would do that in every iteration, to save registers that
// are there in plenty.
SP_DEVICE unsigned keep(unsigned v) {
  return simt::shuffle(v, static_cast<int>(simt::lane()));
}

// What differs between the lanes of a warp.
struct Bitmap8Lane {
  unsigned byte;        // 32s + g: where index_unit has the first of its bytes
  std::uint32_t later;  // 1 in the field of every start that step s comes before
  unsigned quad;        // the lane 4g
  unsigned pair;        // 2t
  unsigned shift;       // where the count of t pairs begins
  std::uint32_t mask;   // its bits, in each byte
};

struct Bitmap8Unit {
  std::uint32_t bits;    // lane 4g + s, byte i: row g of bitmap i of step s
  std::uint32_t before;  // values of the step before that row
  std::uint32_t counts;  // in its first pair (2 bits: up to 2), first two (3 bits: up to 4), first three (3 bits: up to 6)
  std::uint32_t starts;  // all lanes alike: the unit's values before steps 1, 2 and 3, in 10 bits each
};

struct Bitmap8Step {
  std::uint32_t keep;   // byte i: bits 2L and 2L + 1 of bitmap i
  std::uint32_t place;  // byte i: where the first of them that is set has its value, counted from `start`
  unsigned start;
};

SP_DEVICE Bitmap8Lane bitmap8_lane() {
  const unsigned g = simt::lane() / 4, t = simt::lane() % 4;
  constexpr std::uint32_t kStarts = 1u | 1u << 10 | 1u << 20;
  Bitmap8Lane me{};
  me.byte = keep(32 * t + g);
  me.later = keep(kStarts >> 10 * t << 10 * t);
  me.quad = 4 * g;
  me.pair = keep(2 * t);
  me.shift = keep(t == 3 ? 5 : t == 2 ? 2 : 0);
  me.mask = keep(t == 0 ? 0 : t == 1 ? 0x03030303u : 0x07070707u);
  return me;
}

// p: the unit's 128 bytes of bitmaps, from me.byte on. Four byte loads: a 4 x 8 byte transposition in which no bank is asked
// for two words.
SP_DEVICE Bitmap8Unit index_unit(const Bitmap8Lane& me, simt::Shared<const std::uint8_t> p) {
  Bitmap8Unit unit{};
  unit.bits = static_cast<std::uint32_t>(p[0]) | static_cast<std::uint32_t>(p[8]) << 8 |
              static_cast<std::uint32_t>(p[16]) << 16 | static_cast<std::uint32_t>(p[24]) << 24;

  const std::uint32_t pairs = unit.bits - (unit.bits >> 1 & 0x55555555u);  // 2 bits a pair
  const std::uint32_t one = pairs & 0x03030303u;
  const std::uint32_t two = one + (pairs >> 2 & 0x03030303u);
  const std::uint32_t three = two + (pairs >> 4 & 0x03030303u);
  const std::uint32_t row = three + (pairs >> 6 & 0x03030303u);
  unit.counts = one + (two << 2) + (three << 5);

  std::uint32_t rows = row;  // this row's and those above it, up to 64
  SP_UNROLL
  for (unsigned d = 4; d < 32; d *= 2) {
    const std::uint32_t above = simt::shuffle_up(rows, d);
    if (simt::lane() >= d) rows += above;
  }
  const std::uint32_t totals = simt::shuffle(rows, static_cast<int>(simt::lane() | 28u));
  const std::uint32_t bitmaps_before = totals * 0x01010100u;  // byte i: the sum of totals 0 .. i - 1, up to 192
  unit.before = rows - row + bitmaps_before;

  unit.starts = simt::dot4(totals, 0x01010101u, 0) * me.later;
  unit.starts += simt::shuffle_xor(unit.starts, 1);
  unit.starts += simt::shuffle_xor(unit.starts, 2);
  return unit;
}

template <int STEP>
SP_DEVICE Bitmap8Step step_of(const Bitmap8Lane& me, const Bitmap8Unit& unit) {
  const int from = static_cast<int>(me.quad | STEP);
  const std::uint32_t bits = simt::shuffle(unit.bits, from);
  const std::uint32_t before = simt::shuffle(unit.before, from);
  const std::uint32_t counts = simt::shuffle(unit.counts, from);
  Bitmap8Step step{};
  step.keep = bits >> me.pair & 0x03030303u;
  step.place = before + (counts >> me.shift & me.mask);
  step.start = STEP == 0 ? 0 : unit.starts >> 10 * (STEP - 1) & 1023u;
  return step;
}

// The byte offset of bitmap I's value, of ITEM bytes, of a unit whose values begin at `slot`. In two instructions, where to
// extract a byte, to scale and to add would be two for each bitmap.
template <int I, int ITEM>
SP_DEVICE unsigned byte_offset(const Bitmap8Step& step, unsigned slot) {
  return simt::dot4(step.place, static_cast<std::uint32_t>(ITEM) << 8 * I, slot + ITEM * step.start);
}

}  // namespace sparseprune::cuda
