// Linear, int8 and int4 weights, dense and 2:4, on the tensor cores.
//
// Equation        out[n][m] = bias[m] + sum over groups G of columns of
//                     scale[m][G] sum over k in G of q[m][k] x[n][k]  +  minimum[m][G] sum over k in G of x[n][k],
//                 the sums in float32. q: the code, less 8 for int4. With minimums q is less 8, too, and 8 scale is added to
//                 the minimum, which it then mostly cancels: fewer digits are lost than in sums of codes from 0 to 15.
//
// Accuracy        Codes are whole numbers of at most 8 bits: as bfloat16 and float16 they are exact, and so is their product
//                 with an x of 16 bits in float32. A scale that went into the operand would be rounded with it, to 9 bits in
//                 bfloat16: scales multiply the float32 sum of a slab instead. What is rounded is float32 sums and products
//                 with scales, nothing else: K columns are within gamma(32 + 2 K / 32) of the exact sum of magnitudes
//                 [Higham, section 3.1]. tests/helpers/codes.py holds them to that.
//
// Operands        weight: units of 32 rows x 64 columns (core/layouts/fragments.h), operand A of mma.m16n8k16 or
//                 mma.sp.m16n8k32. x, out, partial sums, partition: as in sparse24.cuh; product.cuh.
//
// Preconditions   units at 16 bytes; 1 <= rows, batch; 0 <= cols <= 2^30.
//
// Partition       Of a block of 64 columns a warp makes slabs: two steps of the instruction, dense 32 columns, 2:4 all 64.
//                 Of a slab it expands the codes of all its rows to registers, then takes its batch rows 8 at a time:
//
//                     codes -> a [2 steps][2 tiles of 16 rows][4]      once a slab
//                     for 8 batch rows:  part = a x                    8 registers
//                                        sums += scale part            8 multiply-adds for 4 mma
//
//                 so that unscaled sums of 8 batch rows only are held beside all the scaled ones. Groups of 64 and 128 columns
//                 are scaled slab by slab, too: with the same scale. 2:4 in groups of 32 is scaled after each step.
//
// Constants       int4: from a word of 8 codes (w >> 4r & 0x000f000f) | base is 128 + q (bfloat16; 1024 + q in float16) for
//                 a register of the fragment, less 136 by one fma of two: 11 instructions for 8 weights (float16: 9). int8:
//                 float16 by the same trick from bytes, 1 a weight; bfloat16 has too few bits for it and goes by way of
//                 float32, 2.5 a weight. While a unit of dense int4 arrives, an SM of an H100 has time for 290 instructions,
//                 of which 8 batch rows take 195 (bfloat16, counted in the code for sm_80).
//                 The sum of x over a group, for minimums, is one mma more a step, of an A of ones: all rows of it are the
//                 same sum, which is then where the multiply-adds want it.
#pragma once

#include <cstring>
#include <iterator>
#include <type_traits>
#include <utility>

#include "cuda/linear/fragments.h"
#include "cuda/linear/product.cuh"
#include "cuda/linear/product_drain.cuh"

namespace sparseprune::cuda {

// What is packed, as constants; a stage has room for two sets of scales in each unit.
template <int BITS, bool TWO_FOUR, bool MINIMUMS>
struct FragmentsWeight {
  static constexpr fragments::Unit kUnit{BITS, TWO_FOUR, MINIMUMS, 2};
  static constexpr int kBits = BITS, kUnitBytes = kUnit.bytes(), kSetsBegin = kUnit.sets_begin(),
                       kSetBytes = kUnit.set_bytes();
  static constexpr int kPlacesBegin = kUnit.code_bytes();
  static constexpr bool kTwoFour = TWO_FOUR, kMinimums = MINIMUMS;
  static constexpr int kFragmentWords = BITS / 4, kSlabs = kUnit.cols() / 16 / kSlabSteps;
  static constexpr int kSlabSets = TWO_FOUR ? 2 : 1;  // sets of scales that a slab may need
  static constexpr const auto& kConfigs = kFragmentsConfigs;
};

template <typename W, int CONFIG>
struct FragmentsTile : ProductTile<W, CONFIG> {
  using Tile = ProductTile<W, CONFIG>;
  // Copies of 16 bytes by each of a unit's threads.
  static constexpr int kUnitThreads = Tile::kGroup / Tile::kBlockUnits, kRound = 16 * kUnitThreads;
  static constexpr int kUnitCopies = (W::kUnitBytes + kRound - 1) / kRound;
  static_assert(Tile::kUnits == 1, "a warp has one strip");
};

struct FragmentsArgs : ProductArgs {
  simt::Global<const std::uint8_t> units;
  std::int64_t strip_bytes;
  int unit_bytes;   // what a unit has in memory
  bool two_sets;    // a unit has two sets of scales: groups of 32
  bool f16_scales;  // else bfloat16
};

struct FragmentsPlace : ProductPlace {
  int a_byte;  // within a stage: the warp's unit
};

// What a thread copies next.
struct FragmentsCursor {
  simt::Global<const std::uint8_t> unit;  // from the thread's part on
  simt::Global<const std::uint16_t> x;
  int block, columns;  // blocks of columns are counted; columns of x from the thread's part to the last
};

template <typename C>
SP_DEVICE FragmentsCursor fragments_cursor(const FragmentsArgs& a, const FragmentsPlace& p) {
  // Past the last strip that one is read again: nothing of it is written, and its metadata are legal.
  const int own = p.thread / C::kUnitThreads, unit = own < p.units ? own : p.units - 1;
  return {
      a.units + ((p.strip + unit) * a.strip_bytes + std::int64_t{p.first} * a.unit_bytes + p.thread % C::kUnitThreads * 16),
      product_x(a, p, p.first), p.first, a.cols - p.first * kUnitCols - p.thread % 8 * 8};
}

// Brings the cursor's block of columns to a stage, if there is one, and moves on to the K group's next.
template <typename W, typename C>
SP_DEVICE void fragments_fetch(const FragmentsArgs& a, const FragmentsPlace& p, FragmentsCursor& c,
                               simt::Shared<std::uint8_t> stage) {
  if (c.block < p.end) {
    const int part = p.thread % C::kUnitThreads * 16;
    const auto to = stage + (p.thread / C::kUnitThreads * W::kUnitBytes + part);
    SP_UNROLL
    for (int i = 0; i < C::kUnitCopies; ++i) {
      if (part + i * C::kRound < a.unit_bytes) simt::cp_async16(to + i * C::kRound, c.unit + i * C::kRound, 16);
    }
    SP_UNROLL
    for (int i = 0; i < C::kXCopies; ++i) product_copy_x<C>(a, p, c.x, c.columns, stage, true, i);
  }
  simt::cp_async_commit();  // also without a copy: waiting counts groups
  c.unit += C::kWarpsK * a.unit_bytes;
  c.x += C::kWarpsK * kUnitCols;
  c.block += C::kWarpsK;
  c.columns -= C::kWarpsK * kUnitCols;
}

// Pairs of 16 bits: 1, and the least power of two of which the last place is 1.
template <typename T>
struct Pair {
  static constexpr std::uint32_t kOne = 0x3c003c00u, kBase = 0x64006400u;  // f16: 1024
};
template <>
struct Pair<bf16> {
  static constexpr std::uint32_t kOne = 0x3f803f80u, kBase = 0x43004300u;  // 128
};
constexpr std::uint32_t kMinus = 0x80008000u;

// The 4 registers of a fragment from its codes, as whole numbers: code - 8, or code + 128 - 128.
template <typename T, int BITS>
SP_DEVICE void fragments_expand(const std::uint32_t* w, std::uint32_t (&a)[4]) {
  constexpr std::uint32_t kBase = Pair<T>::kBase, kOne = Pair<T>::kOne;
  if constexpr (BITS == 4 && std::is_same_v<T, f16>) {
    // There is room for a code in the next four places, too: 1024 + 16 q, of which a sixteenth less 72 is q - 8.
    constexpr std::uint32_t kLess = (kBase + 0x00080008u) | kMinus, kSixteenth = 0x2c002c00u, kLess72 = 0xd480d480u;
    SP_UNROLL
    for (int r = 0; r < 4; r += 2) {
      const std::uint32_t v = w[0] >> 4 * r;
      a[r] = simt::fma2<T>(simt::and_or(v, 0x000f000fu, kBase), kOne, kLess);
      a[r + 1] = simt::fma2<T>(simt::and_or(v, 0x00f000f0u, kBase), kSixteenth, kLess72);
    }
  } else if constexpr (BITS == 4) {
    constexpr std::uint32_t kLess = (kBase + 0x00080008u) | kMinus;
    SP_UNROLL
    for (int r = 0; r < 4; ++r) a[r] = simt::fma2<T>(simt::and_or(w[0] >> 4 * r, 0x000f000fu, kBase), kOne, kLess);
  } else if constexpr (std::is_same_v<T, f16>) {
    constexpr std::uint32_t kLess = (kBase + 0x00800080u) | kMinus;
    SP_UNROLL
    for (int r = 0; r < 4; ++r) {
      a[r] = simt::fma2<T>(simt::byte_perm(w[r / 2], kBase, r % 2 == 0 ? 0x5150u : 0x5352u), kOne, kLess);
    }
  } else {
    float v[8];
    SP_UNROLL
    for (int e = 0; e < 8; ++e) {
      const std::uint32_t bits = simt::byte_perm(w[e / 4], 0x4b000000u, 0x7540u + static_cast<unsigned>(e % 4));  // 2^23 +
      std::memcpy(&v[e], &bits, 4);
      v[e] -= 8388736.0f;
    }
    SP_UNROLL
    for (int r = 0; r < 4; ++r) {
      std::uint32_t low, high;
      std::memcpy(&low, &v[2 * r], 4), std::memcpy(&high, &v[2 * r + 1], 4);
      a[r] = simt::byte_perm(low, high, 0x7632u);  // whole numbers of 8 bits: the other half is zero
    }
  }
}

// Scales, or minimums, of rows g, g + 8, g + 16 and g + 24 of a unit.
SP_DEVICE void fragments_scales(simt::Shared<const std::uint8_t> p, bool is_f16, float (&s)[4]) {
  const auto words = simt::load<simt::u32x2>(p);
  SP_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto bits = static_cast<std::uint16_t>((i < 2 ? words.x : words.y) >> 16 * (i % 2));
    s[i] = is_f16 ? simt::to_float(f16{bits}) : simt::to_float(bf16{bits});
  }
}

// A warp's operand A of a slab, [step][tile of 16 rows], and of 2:4 its metadata.
struct FragmentsSlab {
  std::uint32_t a[kSlabSteps][2][4], places[kSlabSteps];
};

template <typename T, typename W>
SP_DEVICE void fragments_load(simt::Shared<const std::uint8_t> unit, int slab, FragmentsSlab& f) {
  const int lane = static_cast<int>(simt::lane());
  std::uint32_t w[4 * W::kFragmentWords];  // [step][tile][word]
  SP_UNROLL
  for (int i = 0; i < W::kFragmentWords; ++i) {
    const auto v = simt::load<simt::u32x4>(unit + ((slab * W::kFragmentWords + i) * 512 + lane * 16));
    w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
  }
  SP_UNROLL
  for (int i = 0; i < 2 * kSlabSteps; ++i) fragments_expand<T, W::kBits>(w + i * W::kFragmentWords, f.a[i / 2][i % 2]);
  if constexpr (W::kTwoFour) {
    const auto words = simt::load<simt::u32x2>(unit + (W::kPlacesBegin + lane * 8));
    f.places[0] = words.x, f.places[1] = words.y;
  }
}

// What the sums of a slab are multiplied with, of rows g, g + 8, g + 16 and g + 24.
template <typename W>
struct FragmentsScales {
  float scales[W::kSlabSets][4], minimums[4];
};

template <typename W>
SP_DEVICE void fragments_load_scales(const FragmentsArgs& args, simt::Shared<const std::uint8_t> unit, int slab,
                                     FragmentsScales<W>& f) {
  SP_UNROLL
  for (int s = 0; s < W::kSlabSets; ++s) {
    // Where there is one set, all need the first.
    const int index = args.two_sets ? slab + s : 0;
    const auto set = unit + (W::kSetsBegin + index * W::kSetBytes + static_cast<int>(simt::lane()) / 4 * 8);
    fragments_scales(set, args.f16_scales, f.scales[s]);
    if constexpr (W::kMinimums) {
      fragments_scales(set + fragments::kSetBytes, args.f16_scales, f.minimums);
      SP_UNROLL
      for (int i = 0; i < 4; ++i) f.minimums[i] += 8 * f.scales[s][i];
    }
  }
}

// Of 8 batch rows, without scales: [tile of 16 rows][register]; and of x alone, the same for every row.
struct FragmentsPart {
  float codes[2][4], x[4];
};

template <typename W, typename C>
SP_DEVICE void fragments_add(const FragmentsPart& part, const FragmentsScales<W>& f, int set, int j, ProductSums<C>& acc) {
  SP_UNROLL
  for (int h = 0; h < 2; ++h) {
    SP_UNROLL
    for (int i = 0; i < 4; ++i) {
      float& sum = acc[0][h][j][i];
      sum += f.scales[set][2 * h + i / 2] * part.codes[h][i];
      if constexpr (W::kMinimums) sum += f.minimums[2 * h + i / 2] * part.x[i];
    }
  }
}

template <typename T, typename W, typename C>
SP_DEVICE void fragments_slab(const FragmentsArgs& args, const FragmentsPlace& p, simt::Shared<std::uint8_t> stage, int slab,
                              FragmentsScales<W>& scales, ProductSums<C>& acc) {
  FragmentsSlab f;
  fragments_load<T, W>(stage + p.a_byte, slab, f);
  if (slab == 0 || args.two_sets) fragments_load_scales<W>(args, stage + p.a_byte, slab, scales);
  SP_UNROLL
  for (int j = 0; j < C::kTilesN; ++j) {
    // 32 columns of x; those 32 further on are 4 parts on, which the swizzle leaves one bit away.
    const auto load_b = [&](int half, std::uint32_t (&b)[4]) {
      simt::ldmatrix_x4(b, stage + ((p.b_byte ^ half * 64) + j * 8 * C::kRowBytes));
    };
    FragmentsPart part{};
    std::uint32_t b[4];
    if constexpr (!W::kTwoFour) load_b(slab, b);
    SP_UNROLL
    for (int step = 0; step < kSlabSteps; ++step) {
      if constexpr (W::kTwoFour) {
        load_b(step, b);
        simt::mma_sp_m16n8k32<T, 0>(part.codes[0], f.a[step][0], b, f.places[step]);
        simt::mma_sp_m16n8k32<T, 1>(part.codes[1], f.a[step][1], b, f.places[step]);
        if (step == 0 && args.two_sets) {
          fragments_add<W, C>(part, scales, 0, j, acc);
          part = {};
        }
      } else {
        simt::mma_m16n8k16<T>(part.codes[0], f.a[step][0], {b[2 * step], b[2 * step + 1]});
        simt::mma_m16n8k16<T>(part.codes[1], f.a[step][1], {b[2 * step], b[2 * step + 1]});
      }
      if constexpr (W::kMinimums) {
        constexpr std::uint32_t one = Pair<T>::kOne;
        simt::mma_m16n8k16<T>(part.x, {one, one, one, one}, {b[2 * step], b[2 * step + 1]});
      }
    }
    fragments_add<W, C>(part, scales, W::kSlabSets - 1, j, acc);
  }
}

template <typename T, typename W, typename C>
SP_DEVICE void fragments_multiply(const FragmentsArgs& args, const FragmentsPlace& p, simt::Shared<std::uint8_t> stage,
                                  ProductSums<C>& acc) {
  FragmentsScales<W> scales;
  if constexpr (C::kTilesN == 1) {
    SP_UNROLL
    for (int slab = 0; slab < W::kSlabs; ++slab) fragments_slab<T, W, C>(args, p, stage, slab, scales, acc);
  } else {
    SP_ROLL  // or what is meant for both at once would not fit the registers
        for (int slab = 0; slab < W::kSlabs; ++slab) fragments_slab<T, W, C>(args, p, stage, slab, scales, acc);
  }
}

template <typename T, typename W, int CONFIG>
SP_KERNEL SP_THREADS((FragmentsTile<W, CONFIG>::kThreads), 1) linear_fragments_kernel(FragmentsArgs a) {
  using C = FragmentsTile<W, CONFIG>;
  FragmentsPlace p{product_place<C>(a), 0};
  p.a_byte = p.warp_m * W::kUnitBytes;
  const auto stages = simt::shared_memory<std::uint8_t>(static_cast<unsigned>(p.k_group * C::kStages * C::kStageBytes));
  ProductSums<C> acc = {};
  FragmentsCursor next = fragments_cursor<C>(a, p);
  int block = p.first, read_at = 0, write_at = 0;
  for (int s = 0; s < C::kStages - 1; ++s) {
    fragments_fetch<W, C>(a, p, next, stages + write_at);
    write_at = product_after<C>(write_at);
  }
  for (int round = 0; round < p.rounds; ++round) {
    // The one barrier of a round: the copies of the stage to be read have landed, the others' too; and all have read the
    // stage before it, which is filled next.
    simt::cp_async_wait<C::kStages - 2>();
    if (!a.x_vectors && block < p.end) product_gather_x<C>(a, p, stages + read_at, block);
    product_sync<C>();
    fragments_fetch<W, C>(a, p, next, stages + write_at);
    write_at = product_after<C>(write_at);
    if (block < p.end) fragments_multiply<T, W, C>(a, p, stages + read_at, acc);
    block += C::kWarpsK, read_at = product_after<C>(read_at);
  }
  simt::cp_async_wait<0>();
  product_drain<T, C>(a, p, acc);
}

template <typename T, typename W, int CONFIG>
int launch_fragments(const LinearCall& call, const Geometry& g) {
  using C = FragmentsTile<W, CONFIG>;
  const fragments::Unit unit = fragments::unit_of(call.packing);
  auto a = product_args<C, FragmentsArgs>(call);
  a.units = call.packed + g.values;
  a.unit_bytes = unit.bytes();
  a.strip_bytes = g.kpad / kUnitCols * a.unit_bytes;
  a.two_sets = unit.sets == 2;
  a.f16_scales = call.packing.scales == DType::f16;
  static constexpr ProductName name({"linear_fragments_", W::kBits == 8 ? "int8_" : "int4_", W::kTwoFour ? "24_" : "",
                                     W::kMinimums ? "minimum_" : "", std::is_same_v<T, bf16> ? "bf16_" : "f16_",
                                     kFragmentsConfigs[CONFIG].name});
  return simt::launch(product_grid<C>(name.text, a, call), linear_fragments_kernel<T, W, CONFIG>, a);
}

template <typename T, typename W, int... CONFIG>
int run_fragments(const LinearCall& call, const Geometry& g, std::integer_sequence<int, CONFIG...>) {
  using Launch = int (*)(const LinearCall&, const Geometry&);
  static constexpr Launch launches[] = {launch_fragments<T, W, CONFIG>...};
  return launches[call.plan.config](call, g);
}

template <int BITS, bool TWO_FOUR, bool MINIMUMS>
int linear_fragments_of(const LinearCall& call, const Geometry& g) {
  using W = FragmentsWeight<BITS, TWO_FOUR, MINIMUMS>;
  constexpr auto all = std::make_integer_sequence<int, static_cast<int>(std::size(kFragmentsConfigs))>{};
  return call.packing.dtype == DType::bf16 ? run_fragments<bf16, W>(call, g, all) : run_fragments<f16, W>(call, g, all);
}

}  // namespace sparseprune::cuda
