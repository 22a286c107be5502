// Shuffles, ballots, numbers, barriers, deadlocks, limits, traffic.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "test_simt.h"

namespace sparseprune::simt::test {

namespace {

SP_KERNEL shuffles_kernel(Global<std::uint32_t> out) {
  const std::uint32_t l = lane();
  const Global<std::uint32_t> row = out + 8 * thread_x();
  row[0] = shuffle(l, 5);
  row[1] = shuffle(l, static_cast<int>(31 - l));
  row[2] = shuffle_xor(l, 6);
  row[3] = shuffle_up(l, 3);
  row[4] = ballot(l % 3 == 0);
  row[5] = static_cast<std::uint32_t>(shuffle(static_cast<float>(l) + 0.5f, 7) * 2);
  row[6] = warp() * 100 + block_threads();
  row[7] = shuffle(l, 37);  // modulo 32
}

// Prefix sums of a block, with the idiom of the conversions.
SP_KERNEL scan_kernel(Global<const std::uint32_t> in, Global<std::uint32_t> out) {
  const Shared<std::uint32_t> warps = shared_memory<std::uint32_t>(0);
  std::uint32_t v = in[thread_x()];
  for (unsigned delta = 1; delta < 32; delta *= 2) {
    const std::uint32_t below = shuffle_up(v, delta);
    if (lane() >= delta) v += below;
  }
  if (lane() == 31) warps[warp()] = v;
  sync_block();
  for (unsigned w = 0; w < warp(); ++w) v += warps[w];
  out[thread_x()] = v;
}

SP_KERNEL half_a_warp_shuffles() {
  if (lane() < 16) shuffle(0, 0);
}
SP_KERNEL lanes_at_two_lines() {
  if (lane() < 16) {
    shuffle(0, 0);
  } else {
    shuffle(0, 1);
  }
}
SP_KERNEL one_thread_misses() {
  if (thread_x() == 35) return;
  sync_block();
}
SP_KERNEL warps_at_two_barriers() {
  if (warp() == 0) {
    sync_block();
  } else {
    sync_block();
  }
}
SP_KERNEL never_ends(Global<const int> more) {
  while (more[0]) sync_warp();
}
SP_KERNEL nothing() {
}
SP_KERNEL record_order(Global<std::int64_t> next, Global<std::uint32_t> order) {
  const std::int64_t mine = *next.address();  // unchecked: the order itself is looked at
  atomic_add(next, 1);
  order[mine] = block_x() * block_threads() + thread_x();
}

SP_KERNEL strided_loads(unsigned stride) {
  const Shared<float> p = shared_memory<float>(0);
  for (unsigned i = thread_x(); i < 1024; i += block_threads()) p[i] = 0;
  sync_block();
  float sum = 0;
  for (unsigned i = 0; i < 2; ++i) sum += p[(lane() * stride + i) % 1024];
}
template <typename V>
SP_KERNEL vector_stores(unsigned stride) {
  store(shared_memory<V>(0) + lane() * stride, V{});
}
SP_KERNEL rows_of_ldmatrix(unsigned pitch) {
  const Shared<std::uint8_t> p = shared_memory<std::uint8_t>(0);
  for (unsigned i = lane(); i < 32 * pitch / 16; i += 32) store(p + 16 * i, u32x4{});
  sync_warp();
  std::uint32_t r[4];
  ldmatrix_x4(r, p + lane() * pitch);
}

template <typename V>
SP_KERNEL global_loads(Global<const std::uint8_t> p, int stride) {
  if (lane() != 3) load<V>(p + static_cast<int>(lane()) * stride);
}
SP_KERNEL global_copies(Global<const std::uint8_t> p) {
  const int l = static_cast<int>(lane());
  cp_async16(shared_memory<std::uint8_t>(16 * lane()), p + 16 * l, l == 0 ? 4 : 16);
  cp_async_commit();
  cp_async_wait<0>();
}

// Of the line with so many requests.
Traffic shared_traffic(std::int64_t requests) {
  for (const auto& [line, t] : reports().at("test").shared) {
    if (t.requests == requests) return t;
  }
  return {};
}
Traffic global_traffic() {
  return reports().at("test").global.begin()->second;
}

}  // namespace

void test_warp() {
  clear_buffers();
  Buffer<std::uint32_t> out(64 * 8);
  launch(grid(64), shuffles_kernel, out.data());
  for (std::uint32_t t = 0; t < 64; ++t) {
    const std::uint32_t l = t % 32;
    const std::uint32_t want[8] = {5, 31 - l, l ^ 6, l < 3 ? l : l - 3, 0x49249249, 15, t / 32 * 100 + 64, 5};
    for (std::uint32_t i = 0; i < 8; ++i) expect_equal(out[8 * t + i], want[i], "shuffle " + std::to_string(i));
  }

  Buffer<std::uint32_t> in(256);
  for (std::uint32_t i = 0; i < 256; ++i) in[i] = i % 7;
  launch(grid(256, 64), scan_kernel, in.data(), out.data());
  std::uint32_t sum = 0;
  for (std::uint32_t i = 0; i < 256; ++i) expect_equal(out[i], sum += i % 7, "scan");
}

void test_numbers() {
  struct Case {
    float f;
    std::uint16_t bf16_bits, f16_bits;
  };
  constexpr float inf = std::numeric_limits<float>::infinity();
  const Case cases[] = {
      {0.0f, 0, 0},
      {-0.0f, 0x8000, 0x8000},
      {1.0f, 0x3f80, 0x3c00},
      {-2.5f, 0xc020, 0xc100},
      {1.00390625f, 0x3f80, 0x3c04},     // bf16: half way, to even
      {1.01171875f, 0x3f82, 0x3c0c},     // half way, to even, upwards
      {1.00048828125f, 0x3f80, 0x3c00},  // f16: half way
      {1.00146484375f, 0x3f80, 0x3c02},
      {65504.0f, 0x4780, 0x7bff},
      {65519.996f, 0x4780, 0x7bff},
      {65520.0f, 0x4780, 0x7c00},
      {3.4e38f, 0x7f80, 0x7c00},  // rounds to infinity
      {0x1p-14f, 0x3880, 0x0400},
      {0x1.ff8p-15f, 0x3880, 0x03ff},  // the largest subnormal of f16
      {0x1.ffcp-15f, 0x3880, 0x0400},  // half way to the least normal
      {0x1p-24f, 0x3380, 0x0001},
      {0x1p-25f, 0x3300, 0x0000},
      {0x1.8p-25f, 0x3340, 0x0001},
      {0x1p-140f, 0x0000, 0x0000},
      {inf, 0x7f80, 0x7c00},
      {-inf, 0xff80, 0xfc00},
      {std::nanf(""), 0x7fff, 0x7fff},
  };
  for (const Case& c : cases) {
    if (c.f != 0x1p-140f) expect_equal(from_float<bf16>(c.f).bits, c.bf16_bits, "bf16 of " + std::to_string(c.f));
    expect_equal(from_float<f16>(c.f).bits, c.f16_bits, "f16 of " + std::to_string(c.f));
  }
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto b = static_cast<std::uint16_t>(bits);
    const float f = to_float(f16{b});
    const std::uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                            : exponent == 31
                                ? (fraction ? std::nanf("") : inf)
                                : std::ldexp(static_cast<float>(1024 + fraction), static_cast<int>(exponent) - 25);
    const float want = bits & 0x8000 ? -magnitude : magnitude;
    const bool same = std::isnan(want) ? std::isnan(f) : f == want && std::signbit(f) == std::signbit(want);
    if (!same) expect(false, "f16 " + std::to_string(bits));
    if (!std::isnan(want) && from_float<f16>(f).bits != b) expect(false, "f16 there and back " + std::to_string(bits));
  }
  expect_equal(popc(0xf0f0u) + popc(std::uint64_t{1} << 63 | 5), 11, "popc");
  expect_equal(dot4(0xff020304, 0xff05000a, 7), 255u * 255 + 10 + 40 + 7, "dot4");
  expect_equal(byte_perm(0x03020100, 0x07060504, 0x5140), 0x05010400u, "byte_perm");
  expect_equal(byte_perm(0x00807f01, 0x80000000, 0x1234fa98), 0xffff0000u, "byte_perm, signs");
  expect_equal(and_or(0x12345678, 0x000f000f, 0x43004300), 0x43044308u, "and_or");
  expect_equal(fma2<bf16>(0x430f4300, 0x3f803f80, 0xc308c308), 0x40e0c100u, "143 - 136 and 128 - 136");
  expect_equal(fma2<f16>(0x64086400, 0x3c003c00, 0xe408e408), 0x0000c800u, "1032 - 1032 and 1024 - 1032");
  // Rounded once: (1 + u)^2 - (1 + 2u) is u^2; 1.5 (1 + u) is half way between two, from which 2^-100 takes it, and of
  // which a sum in double does not know; half a unit and u^2 are more than half.
  expect_equal(fma2<bf16>(0x3f813f81, 0x3f813f81, 0xbf82bf82), 0x38803880u, "u^2 in bf16");
  expect_equal(fma2<f16>(0x3c013c01, 0x3c013c01, 0xbc02bc02), 0x00100010u, "u^2 in f16");
  expect_equal(fma2<bf16>(0x3fc03f81, 0x3f813f81, 0x8d803b80), 0x3fc13f83u, "near half way");
  expect_equal(fma2<bf16>(0x3fc07f80, 0x3f813f80, 0x0000ff80) & 0xffff7fff, 0x3fc27fffu, "to even, and inf - inf");
}

void test_machine() {
  clear_buffers();
  expect_fault([] { launch(grid(32), half_a_warp_shuffles); }, "half a warp",
               {"deadlock", "threads 0-15 in shuffle at tests/simt/cases/warp.cpp", "threads 16-31 ended"});
  expect_fault([] { launch(grid(32), lanes_at_two_lines); }, "lanes at two lines",
               {"all 32 lanes must take part, but others of the warp wait at"});
  expect_fault([] { launch(grid(64), one_thread_misses); }, "a thread misses the barrier",
               {"deadlock: threads 0-34 in sync_block at tests/simt/cases/warp.cpp", "thread 35 ended",
                "threads 36-63 in sync_block"});
  expect_fault([] { launch(grid(64), warps_at_two_barriers); }, "two barriers",
               {"sync_block: all threads must take part, but others wait at"});

  Buffer<int> more(1, 1, false);
  const std::uint64_t most = std::exchange(machine.most_meetings, 10000);
  expect_fault([&] { launch(grid(32), never_ends, more.data()); }, "no end", {"this block does not end"});
  machine.most_meetings = most;

  const auto refused = [](Grid g) { return [=] { launch(g, nothing); }; };
  launch(grid(1024, 227 * 1024), nothing);
  expect_fault(refused(grid(1056)), "threads", {"threads must be 1 to 1024, got 1056"});
  expect_fault(refused(grid(40)), "part of a warp", {"multiple of 32"});
  expect_fault(refused(grid(32, 227 * 1024 + 1)), "shared memory", {"at most 227 KiB"});
  expect_fault(refused({"test", 0, 1, 1, 32, 0, nullptr}), "no blocks", {"grid.x must be 1 to 2^31 - 1, got 0"});
  expect_fault(refused({"test", 1, 65536, 1, 32, 0, nullptr}), "grid.y", {"grid.y must be 1 to 65535"});
  expect_fault(refused({"test", 1, 1, 65536, 32, 0, nullptr}), "grid.z", {"grid.z must be 1 to 65535"});

  // The same seed is the same order, another seed another; every thread runs once.
  Buffer<std::int64_t> next(1);
  std::vector<std::uint32_t> orders[3];
  const std::uint64_t before = seed();
  for (std::uint64_t i = 0; i < 3; ++i) {
    Buffer<std::uint32_t> order(256);
    set_seed(i == 2 ? before : before + i);
    next[0] = 0;
    launch(grid(64, 0, 4), record_order, next.data(), order.data());
    for (std::size_t k = 0; k < 256; ++k) orders[i].push_back(order[k]);
  }
  set_seed(before);
  expect(orders[0] == orders[2], "the same seed is the same order");
  expect(orders[0] != orders[1], "another seed is another order");
  std::sort(orders[1].begin(), orders[1].end());
  for (std::uint32_t i = 0; i < 256; ++i) expect_equal(orders[1][i], i, "every thread once");
}

void test_traffic() {
  const auto strided = [](unsigned stride) {
    clear_reports();
    launch(grid(32, 4096), strided_loads, stride);
    return shared_traffic(2);
  };
  expect_equal(strided(1).worst, 1u, "neighbours");
  expect_equal(strided(2).worst, 2u, "every second word");
  expect_equal(strided(32).worst, 32u, "one bank");
  expect_equal(strided(32).units, 64, "one bank, twice");
  expect_equal(strided(33).worst, 1u, "padded rows");
  expect_equal(strided(0).worst, 1u, "one word for all");

  const auto stored = [](auto kernel, unsigned stride, std::int64_t requests) {
    clear_reports();
    launch(grid(32, 32 * 16 * 8), kernel, stride);
    return shared_traffic(requests).worst;
  };
  expect_equal(stored(vector_stores<std::uint16_t>, 1, 1), 1u, "two lanes a word");
  expect_equal(stored(vector_stores<u32x2>, 1, 2), 1u, "8 bytes a lane");
  expect_equal(stored(vector_stores<u32x2>, 2, 2), 2u, "8 bytes a lane, every second");
  expect_equal(stored(vector_stores<u32x4>, 1, 4), 1u, "16 bytes a lane");
  expect_equal(stored(vector_stores<u32x4>, 8, 4), 8u, "16 bytes a lane, a row of 128 bytes each");
  // Stores there are 32 x pitch / 512 x 4 requests, ldmatrix 4.
  const auto rows = [](unsigned pitch) {
    clear_reports();
    launch(grid(32, 32 * 144), rows_of_ldmatrix, pitch);
    return shared_traffic(4).worst;
  };
  expect_equal(rows(128), 8u, "rows of 128 bytes");
  expect_equal(rows(144), 1u, "rows of 128 bytes, padded");
  expect_equal(reports().at("test").ldmatrix, 1, "ldmatrix counted");

  clear_buffers();
  Buffer<u32x4> buffer(130, {}, false);
  const auto address = reinterpret_cast<std::uintptr_t>(buffer.data());
  const auto* const p = reinterpret_cast<const std::uint8_t*>((address + 31) / 32 * 32);
  const auto loaded = [&](auto kernel, int stride) {
    clear_reports();
    launch(grid(32), kernel, p, stride);
    return global_traffic();
  };
  expect_equal(loaded(global_loads<int>, 4).units, 4, "neighbours");
  expect_equal(loaded(global_loads<int>, 4).bytes, 31 * 4, "neighbours but one");
  expect_equal(loaded(global_loads<int>, 64).units, 31, "far apart");
  expect_equal(loaded(global_loads<u32x4>, 16).units, 16, "16 bytes a lane");
  expect_equal(loaded(global_loads<u32x4>, 0).worst, 1u, "one place");
  clear_reports();
  launch(grid(32, 512), global_copies, p);
  expect_equal(global_traffic().bytes, 31 * 16 + 4, "copies");
  expect_equal(global_traffic().units, 16, "copies");
  expect_equal(shared_traffic(4).units, 4, "copies");
}

}  // namespace sparseprune::simt::test
