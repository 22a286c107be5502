// Pointers, and the rules of memory.
#include <concepts>
#include <thread>

#include "test_simt.h"

namespace sparseprune::simt::test {

namespace {

struct Args {
  Global<const int> in;
  Global<int> out, none;
};

SP_KERNEL pointers_kernel(Args a, Global<std::uint8_t> bytes, Global<float> floats) {
  if (thread_x() != 0) return;
  const Global<const int> back = a.out + 3;
  a.out[0] = static_cast<int>(back - a.out);
  a.out[1] = a.none ? 1 : 0;
  a.out[2] = a.none == nullptr && a.in != nullptr;
  a.out[3] = 5;
  a.out[3] += a.in[1];
  a.out[3] |= 64;
  a.out[4] = a.in[a.in[0]];
  bytes[1] = 0xf0;
  bytes[1] &= 0x3c;
  a.out[5] = bytes[1] >> 4 & 1;
  floats[0] = 1.5f;
  floats[1] = floats[0] + 1;
  a.out[6] = reinterpret<const int>(floats)[1];
  a.out[7] = static_cast<int>(load<u32x2>(reinterpret<const std::uint32_t>(a.out)).y);
  store(a.out + 8, u32x4{1, 2, 3, 4});
  Global<int> p = a.out + 12;
  *p++ = 7;
  *p = 8;
  p -= 13;
  a.out[14] = p == a.out && p < a.out + 1;
  store(shared_memory<int>(8), 9);
  a.out[15] = load<int>(shared_at<int>(shared_base() + 8));
}

SP_KERNEL add_one(Global<const std::uint32_t> in, Global<std::uint32_t> out) {
  const unsigned i = block_x() * block_threads() + thread_x();
  out[i] = in[i] + 1;
}

// Thread 40 reads or writes `n` bytes at byte `offset`.
template <typename V>
SP_KERNEL load_at(Global<const std::uint8_t> p, int offset) {
  if (thread_x() == 40) load<V>(p + offset);
}
template <typename V>
SP_KERNEL store_at(Global<std::uint8_t> p, int offset) {
  if (thread_x() == 40) store(p + offset, V{});
}
template <typename V>
SP_KERNEL store_shared_at(int offset) {
  if (thread_x() == 40) store(shared_memory<std::uint8_t>(0) + offset, V{});
}

// One thread writes what another reads, in the one order and in the other.
enum class Between { nothing, warp, block };
SP_KERNEL write_then_read(int writer, int reader, Between between) {
  const Shared<int> p = shared_memory<int>(64);
  const int thread = static_cast<int>(thread_x());
  if (thread == writer) p[1] = 5;
  if (between == Between::warp) sync_warp();
  if (between == Between::block) sync_block();
  if (between == Between::nothing) shuffle(0, 0);  // no barrier, though all lanes meet
  if (thread == reader) p[1] += 0;
}
SP_KERNEL read_then_write(int writer, int reader, Between between) {
  const Shared<int> p = shared_memory<int>(64);
  const int thread = static_cast<int>(thread_x());
  if (thread == 0) p[1] = 5;
  sync_block();
  int v = 0;
  if (thread == reader) v = p[1];
  if (between == Between::warp) sync_warp();
  if (between == Between::block) sync_block();
  if (between == Between::nothing) v += shuffle(0, 0);
  if (thread == writer) p[1] = v;
}
// Every lane reads, one writes: right after a barrier of the warp, if all readers are of the warp.
SP_KERNEL all_read_one_writes(unsigned readers, bool barrier) {
  const Shared<int> p = shared_memory<int>(0);
  if (thread_x() == 0) p[0] = 5;
  sync_block();
  int v = 0;
  if (thread_x() < readers) v = p[0];
  if (barrier) sync_warp();
  if (thread_x() == 0) p[0] = v;
}
SP_KERNEL read_shared_byte(int offset) {
  const Shared<std::uint8_t> p = shared_memory<std::uint8_t>(0);
  if (thread_x() == 0) store(p + 4, std::uint16_t{7});
  if (thread_x() == 0) p[offset] |= 0;
}
// Neighbouring bytes belong to different threads; then the word is read whole.
SP_KERNEL bytes_of_threads(Global<std::uint32_t> out, bool barrier) {
  const Shared<std::uint8_t> p = shared_memory<std::uint8_t>(0);
  p[thread_x()] = static_cast<std::uint8_t>(thread_x());
  if (barrier) sync_block();
  if (thread_x() < 16) out[thread_x()] = load<std::uint32_t>(p + 4 * thread_x());
}
SP_KERNEL shared_of_last_block(Global<int> out) {
  const Shared<int> p = shared_memory<int>(0);
  if (block_x() == 0 && thread_x() == 0) p[0] = 3;
  if (block_x() == 1 && thread_x() == 0) out[0] = p[0];
}

SP_KERNEL same_place(Global<int> out, int step) {
  out[thread_x() / 2 * 2 + thread_x() % 2 * step] = 1;
}
SP_KERNEL blocks_same_place(Global<int> out) {
  if (thread_x() == 0) out[0] = 1;
}
SP_KERNEL blocks_add(Global<std::int64_t> out, bool read) {
  atomic_add(out, 2);
  atomic_min(out + 1, static_cast<std::int64_t>(block_x()) * 100 + thread_x());
  if (read && thread_x() == 0) out[0] += 0;
}
// In place: thread i reads i + `from` and writes i.
SP_KERNEL in_place(Global<int> data, unsigned from, bool barrier) {
  const unsigned i = block_x() * block_threads() + thread_x();
  const int v = data[i + from];
  if (barrier) sync_block();
  data[i] = v + 1;
}
SP_KERNEL stream_of_written(Global<int> data, unsigned reader) {
  if (thread_x() == 0) data[0] = 1;
  sync_block();
  if (thread_x() == reader) data[1] = load_stream<int>(data);
}

}  // namespace

void test_pointers() {
  clear_buffers();
  Buffer<int> in(2, 1, false), out(16);
  Buffer<std::uint8_t> bytes(2);
  Buffer<float> floats(2);
  launch(grid(32, 64), pointers_kernel, Args{in.data(), out.data(), nullptr}, bytes.data(), floats.data());
  const int want[16] = {3, 0, 1, (5 + 1) | 64, 1, 1, 0x40200000, 0, 1, 2, 3, 4, 7, 8, 1, 9};
  for (int i = 0; i < 16; ++i) expect_equal(out[static_cast<std::size_t>(i)], want[i], "pointers " + std::to_string(i));
  static_assert(std::is_trivially_copyable_v<Args>, "arguments can be copied to a card");
  static_assert(std::convertible_to<Reference<Global<int>>, int> && !std::convertible_to<Reference<Global<int>>&, int>,
                "p[i] is used up where it stands: auto v = p[i] gives no value later");
  static_assert(std::convertible_to<Reference<Global<float>>, float> && !std::convertible_to<Reference<Global<float>>, int>,
                "c ? p[i] : 0 is not an int");
  static_assert(std::convertible_to<Global<int>, Global<const int>> && !std::convertible_to<Global<const int>, Global<int>>);
}

void test_places() {
  clear_buffers();
  Buffer<std::uint32_t> in(256), out(256);
  for (std::uint32_t i = 0; i < 256; ++i) in[i] = 2 * i;
  launch(grid(64, 0, 4), add_one, in.data(), out.data());
  for (std::uint32_t i = 0; i < 256; ++i) expect_equal(out[i], 2 * i + 1, "every thread of every block");
}

void test_global() {
  clear_buffers();
  Buffer<u32x4> buffer(4), input(4, {}, false);
  auto* const p = reinterpret_cast<std::uint8_t*>(buffer.data());
  auto* const q = reinterpret_cast<std::uint8_t*>(input.data());
  launch(grid(64), load_at<u32x4>, p, 48);
  launch(grid(64), load_at<u32x2>, p, 40);
  launch(grid(64), store_at<u32x4>, p, 48);
  const auto run = [&](auto kernel, std::uint8_t* at, int offset) { return [=] { launch(grid(64), kernel, at, offset); }; };
  expect_fault(run(load_at<u32x4>, p, 64), "past the end",
               {"out of bounds, byte 64 of a buffer of 64", "thread 40 (warp 1, lane 8)"});
  expect_fault(run(load_at<u32x4>, p, 56), "past the end in part", {"read of 16 bytes", "out of bounds, byte 56"});
  expect_fault(run(load_at<std::uint8_t>, p, -1), "before the beginning", {"out of bounds, byte -1 of"});
  expect_fault(run(store_at<std::uint16_t>, p, 64), "write past the end",
               {"write of 2 bytes: out of bounds", "cases/memory.cpp:"});
  expect_fault(run(load_at<u32x4>, p, 8), "misaligned", {"misaligned, byte 8", "not a multiple of 16"});
  expect_fault(run(store_at<u32x2>, p, 4), "misaligned write", {"misaligned, byte 4", "not a multiple of 8"});
  expect_fault(run(store_at<int>, q, 4), "write to an input", {"the buffer is an input"});
  expect_fault(run(load_at<int>, nullptr, 4), "null", {"null pointer"});
  int unknown = 0;
  expect_fault(run(load_at<int>, reinterpret_cast<std::uint8_t*>(&unknown), 0), "unregistered", {"in no buffer"});

  Buffer<int> out(128);
  launch(grid(64), same_place, out.data(), 1);
  expect_fault([&] { launch(grid(64), same_place, out.data(), 0); }, "two threads write one place",
               {"written, which was written by thread", "with no barrier since"});
  launch(grid(32), blocks_same_place, out.data());
  launch(grid(32), blocks_same_place, out.data());
  expect_fault([&] { launch(grid(32, 0, 2), blocks_same_place, out.data()); }, "two blocks write one place",
               {"which was written by another block"});
  launch(grid(64, 0, 2), in_place, out.data(), 0, false);
  launch(grid(64), in_place, out.data(), 1, true);
  expect_fault([&] { launch(grid(64), in_place, out.data(), 1, false); }, "in place without a barrier",
               {"with no barrier since"});
  expect_fault([&] { launch(grid(32, 0, 2), in_place, out.data(), 1, true); }, "in place across blocks", {"another block"});
  expect_fault([&] { launch(grid(64), stream_of_written, out.data(), 0); }, "load_stream of what the kernel writes",
               {"load_stream"});

  Buffer<std::int64_t> sums(2);
  sums[1] = 1000;
  launch(grid(64, 0, 3), blocks_add, sums.data(), false);
  expect_equal(sums[0], 2 * 192, "atomic_add");
  expect_equal(sums[1], 0, "atomic_min");
  expect_fault([&] { launch(grid(64, 0, 3), blocks_add, sums.data(), true); }, "an atomic's place read",
               {"global memory, byte 0: read"});

  // The clock begins anew: what it dated before conflicts with nothing, what it dates from then on does.
  launch(grid(64), same_place, out.data(), 1);
  machine.clock = UINT32_MAX / 2 + 1;
  launch(grid(64), same_place, out.data(), 1);
  expect(machine.clock < 100, "the clock begins anew");
  expect_fault([&] { launch(grid(64), same_place, out.data(), 0); }, "two threads, by the second clock",
               {"written, which was written"});

  // Another thread's buffers are its own.
  std::thread([&] {
    expect_fault([&] { launch(grid(64), same_place, out.data(), 1); }, "another thread's buffer", {"in no buffer"});
    clear_buffers();
  }).join();
  launch(grid(64), same_place, out.data(), 1);

  // Memory that is used again, smaller; and two views of one buffer.
  register_buffer(p, 64, true);
  launch(grid(64), load_at<u32x4>, p, 48);
  register_buffer(p, 32, false);
  expect_fault(run(load_at<u32x4>, p, 48), "the buffer that was here", {"out of bounds, byte 48 of a buffer of 32"});
  register_buffer(p, 32, false);
  register_buffer(p + 16, 48, true);
  launch(grid(64), store_at<u32x4>, p, 0);
  launch(grid(64), store_at<u32x4>, p, 48);
}

void test_shared() {
  clear_buffers();
  launch(grid(64, 64), store_shared_at<u32x4>, 48);
  expect_fault([] { launch(grid(64, 64), store_shared_at<u32x4>, 64); }, "past shared memory",
               {"shared memory, write of 16 bytes: out of bounds, byte 64 of 64"});
  expect_fault([] { launch(grid(64, 64), store_shared_at<int>, -4); }, "before shared memory", {"out of bounds, byte -4"});
  expect_fault([] { launch(grid(64, 64), store_shared_at<u32x4>, 8); }, "misaligned in shared memory",
               {"misaligned, byte 8"});

  using enum Between;
  const auto pair = [](auto kernel, int writer, int reader, Between between) {
    return [=] { launch(grid(64, 128), kernel, writer, reader, between); };
  };
  for (const Between between : {nothing, warp, block}) {
    pair(write_then_read, 3, 3, between)();
    pair(read_then_write, 3, 3, between)();
  }
  pair(write_then_read, 3, 8, warp)();
  pair(read_then_write, 3, 8, warp)();
  pair(write_then_read, 3, 40, block)();
  pair(read_then_write, 3, 40, block)();
  // Which thread is first depends on the seed, that there is a fault does not.
  expect_fault(pair(write_then_read, 3, 8, nothing), "written and read in a warp", {"shared memory, byte 68", "thread"});
  expect_fault(pair(read_then_write, 3, 8, nothing), "read and written in a warp",
               {"shared memory, byte 68", "written, which was read by thread 8 (tests/simt/cases/memory.cpp"});
  expect_fault(pair(write_then_read, 3, 40, warp), "written and read by two warps", {"shared memory, byte 68"});
  expect_fault(pair(read_then_write, 3, 40, warp), "read and written by two warps", {"shared memory, byte 68"});

  launch(grid(64, 64), all_read_one_writes, 32u, true);
  launch(grid(64, 64), all_read_one_writes, 1u, false);
  expect_fault([] { launch(grid(64, 64), all_read_one_writes, 32u, false); }, "read by a warp, then written",
               {"with no barrier since"});
  expect_fault([] { launch(grid(64, 64), all_read_one_writes, 64u, true); }, "read by two warps, then written",
               {"with no barrier since"});

  launch(grid(32, 64), read_shared_byte, 5);
  expect_fault([] { launch(grid(32, 64), read_shared_byte, 6); }, "unwritten shared memory",
               {"byte 6: read, but nobody has written it"});

  Buffer<std::uint32_t> out(16);
  launch(grid(64, 64), bytes_of_threads, out.data(), true);
  for (std::uint32_t i = 0; i < 16; ++i) expect_equal(out[i], 0x03020100 + 0x04040404 * i, "bytes of threads");
  expect_fault([&] { launch(grid(64, 64), bytes_of_threads, out.data(), false); }, "bytes of threads without a barrier",
               {"shared memory, byte"});

  Buffer<int> result(1);
  expect_fault([&] { launch(grid(32, 64, 2), shared_of_last_block, result.data()); }, "what another block left",
               {"nobody has written it"});
}

}  // namespace sparseprune::simt::test
