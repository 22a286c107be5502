// cp.async: it lands at the wait of the thread that issued it, and a barrier more is needed by the others.
#include "test_simt.h"

namespace sparseprune::simt::test {

namespace {

enum class Mistake {
  none,
  no_wait,         // read before the wait
  young_wait,      // the wait leaves the group under way
  no_commit,       // the wait does not know of the copy
  no_barrier,      // another thread reads after the issuer's wait
  warp_barrier,    // another warp's thread reads after a barrier of the warp
  left,            // never waited for
  left_open,       // never committed
  write_under_it,  // a store to where it will land
  over_read,       // issued over what another thread still reads
};

// Thread t brings 16 bytes, thread t ^ other reads them.
SP_KERNEL copy_kernel(Global<const std::uint8_t> in, Global<u32x4> out, unsigned other, Mistake mistake) {
  const Shared<std::uint8_t> stage = shared_memory<std::uint8_t>(0);
  const unsigned t = thread_x();
  if (mistake == Mistake::over_read) {
    store(stage + 16 * t, u32x4{t, 0, 0, 0});
    sync_block();
    load<u32x4>(stage + 16 * (t ^ 1));
    shuffle(0, 0);
  }
  cp_async16(stage + 16 * t, in + 16 * t, 16);
  if (mistake == Mistake::left_open) return;
  if (mistake != Mistake::no_commit) cp_async_commit();
  if (mistake == Mistake::left) return;
  if (mistake == Mistake::write_under_it) stage[16 * t] = 1;
  if (mistake == Mistake::young_wait) {
    cp_async_wait<1>();
  } else if (mistake != Mistake::no_wait) {
    cp_async_wait<0>();
  }
  if (mistake == Mistake::warp_barrier) {
    sync_warp();
  } else if (mistake != Mistake::no_barrier) {
    sync_block();
  } else {
    shuffle(0, 0);
  }
  store(out + t, load<u32x4>(stage + 16 * (t ^ other)));
}

// Three groups of one copy each: 16, 5 and 0 bytes; waits for two, reads them, waits for the last.
SP_KERNEL groups_kernel(Global<const std::uint8_t> in, Global<u32x4> out, bool too_early) {
  const Shared<std::uint8_t> stage = shared_memory<std::uint8_t>(0) + 48 * thread_x();
  cp_async16(stage, in, 16);
  cp_async_commit();
  cp_async16(stage + 16, in + 16, 5);
  cp_async_commit();
  cp_async16(stage + 32, Global<const std::uint8_t>(nullptr), 0);  // its source is not looked at
  cp_async_commit();
  cp_async_wait<1>();
  const Global<u32x4> mine = out + 3 * thread_x();
  store(mine, load<u32x4>(stage));
  store(mine + 1, load<u32x4>(stage + 16));
  if (too_early) load<u32x4>(stage + 32);
  cp_async_wait<0>();
  store(mine + 2, load<u32x4>(stage + 32));
}

SP_KERNEL one_copy(Global<const std::uint8_t> in, int from, int to, int bytes) {
  if (thread_x() == 0) cp_async16(shared_memory<std::uint8_t>(0) + to, in + from, bytes);
  cp_async_commit();
  cp_async_wait<0>();
}

// A ring of two stages over many blocks of columns: what the linear kernels do. `skip`: the barrier that is left out.
SP_KERNEL ring_kernel(Global<const std::uint32_t> in, Global<std::uint32_t> out, int blocks, int skip) {
  const Shared<std::uint32_t> stages = shared_memory<std::uint32_t>(0);
  const unsigned t = thread_x(), n = block_threads();
  std::uint32_t sum = 0;
  cp_async16(stages + 4 * t, in + 4 * t, 16);
  cp_async_commit();
  for (int b = 0; b < blocks; ++b) {
    const unsigned next = static_cast<unsigned>(b + 1);
    if (b + 1 < blocks) cp_async16(stages + (next % 2 * n + t) * 4, in + (next * n + t) * 4, 16);
    cp_async_commit();
    cp_async_wait<1>();
    if (skip != 0) sync_block();
    sum += stages[(static_cast<unsigned>(b) % 2 * n + (t + 33) % n) * 4 + 1];
    if (skip != 1) sync_block();
  }
  out[t] = sum;
}

}  // namespace

void test_copies() {
  clear_buffers();
  Buffer<u32x4> in(64, {}, false), out(192);
  for (std::uint32_t i = 0; i < 64; ++i) in[i] = {i, 2 * i, 3 * i, 0x04030201};
  const auto* const bytes = reinterpret_cast<const std::uint8_t*>(in.data());
  const auto run = [&](Mistake mistake, unsigned other) {
    return [=, &out] { launch(grid(64, 4096), copy_kernel, bytes, out.data(), other, mistake); };
  };
  run(Mistake::none, 33)();
  for (std::uint32_t i = 0; i < 64; ++i) expect_equal(out[i].y, 2 * (i ^ 33), "cp.async");
  run(Mistake::no_barrier, 0)();  // one's own needs none
  run(Mistake::warp_barrier, 5)();

  expect_fault(run(Mistake::no_wait, 0), "no wait", {"while a cp.async of thread", "no wait for its group yet"});
  expect_fault(run(Mistake::young_wait, 0), "wait for an older group", {"while a cp.async of thread", "cases/copies.cpp"});
  expect_fault(run(Mistake::no_commit, 0), "no commit", {"while a cp.async of thread"});
  expect_fault(run(Mistake::no_barrier, 1), "no barrier after the wait", {"shared memory, byte"});
  expect_fault(run(Mistake::warp_barrier, 33), "a warp's barrier for the block's", {"shared memory, byte"});
  expect_fault(run(Mistake::left, 0), "left under way", {"cp.async: not waited for when its thread ends"});
  expect_fault(run(Mistake::left_open, 0), "left uncommitted", {"cp.async: never committed when its thread ends"});
  expect_fault(run(Mistake::write_under_it, 0), "a store under it", {"written, while a cp.async"});
  expect_fault(run(Mistake::over_read, 0), "over what is read", {"target of a cp.async, which was read by thread"});

  launch(grid(32, 48 * 32), groups_kernel, bytes, out.data(), false);
  for (std::uint32_t i = 0; i < 32; ++i) {
    const u32x4 first = out[3 * i], second = out[3 * i + 1], third = out[3 * i + 2];
    expect(first.x == 0 && first.w == 0x04030201, "16 bytes");
    expect(second.x == 1 && second.y == 2 && second.z == 0 && second.w == 0, "5 bytes, then zeros");
    expect(third.x == 0 && third.y == 0 && third.z == 0 && third.w == 0, "0 bytes");
  }
  expect_fault([&] { launch(grid(32, 48 * 32), groups_kernel, bytes, out.data(), true); }, "the youngest group read early",
               {"while a cp.async"});

  const auto one = [&](int from, int to, int n) { return [=] { launch(grid(32, 64), one_copy, bytes, from, to, n); }; };
  one(1008, 48, 16)();
  expect_fault(one(8, 0, 16), "source misaligned", {"global memory, cp.async", "not a multiple of 16"});
  expect_fault(one(0, 8, 16), "target misaligned", {"shared memory, cp.async", "misaligned"});
  expect_fault(one(1024, 0, 1), "source past the end", {"out of bounds"});
  expect_fault(one(0, 64, 16), "target past the end", {"out of bounds"});
  expect_fault(one(0, 0, 17), "17 bytes", {"bytes must be 0 to 16"});

  Buffer<std::uint32_t> stream(64 * 4 * 5, 0, false), sums(64);
  for (std::uint32_t i = 0; i < 64 * 4 * 5; ++i) stream[i] = i;
  launch(grid(64, 2048), ring_kernel, stream.data(), sums.data(), 5, -1);
  for (std::uint32_t t = 0; t < 64; ++t) {
    std::uint32_t want = 0;
    for (std::uint32_t b = 0; b < 5; ++b) want += (b * 64 + (t + 33) % 64) * 4 + 1;
    expect_equal(sums[t], want, "ring of stages");
  }
  for (int skip = 0; skip < 2; ++skip) {
    expect_fault([&] { launch(grid(64, 2048), ring_kernel, stream.data(), sums.data(), 5, skip); },
                 skip ? "ring without the barrier before reuse" : "ring without the barrier after the wait",
                 {"shared memory, byte"});
  }
}

}  // namespace sparseprune::simt::test
