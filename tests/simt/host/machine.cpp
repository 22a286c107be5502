#include "host/machine.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>

#include "host/memory.h"
#include "host/report.h"
#include "host/traffic.h"
#include "simt.h"

namespace sparseprune::simt {

Machine machine;

namespace {

// Every so often, on average, another warp goes on although this one could.
constexpr std::uint32_t kWarpSteps = 8;

// Any order will do, if it is another each time: the high half of a linear congruential generator.
struct Random {
  std::uint64_t state = 0;
  std::uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(state >> 32);
  }
};

// The block under way, beside what machine.h shows.
struct Block {
  Context outside;  // who runs the block
  std::uint32_t ready_warps = 0;
  unsigned alive = 0, at_barrier = 0;
  std::uint64_t meetings = 0;
  Location barrier;
  std::string failure;  // what ended it early
  Body body{};
};

Block block;
Random random_order;
Thread threads[kMaxThreads];

std::uint64_t first_seed() {
  if (const char* text = std::getenv("SPARSEPRUNE_SIMT_SEED")) {
    char* end = nullptr;
    const std::uint64_t value = std::strtoull(text, &end, 10);
    if (end == text || *end)
      throw std::invalid_argument(std::string("SPARSEPRUNE_SIMT_SEED: must be a whole number, got ") + text);
    return value;
  }
  return std::random_device{}();
}
std::uint64_t& seed_value() {
  static std::uint64_t value = first_seed();
  return value;
}

bool same_place(const Location& a, const Location& b) {
  return site_of(a) == site_of(b) ||
         (a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0);
}

// One of the bits set, by chance.
unsigned pick(std::uint32_t bits, std::uint32_t chance) {
  const int turn = static_cast<int>(chance % 32);
  return (static_cast<unsigned>(std::countr_zero(std::rotr(bits, turn))) + static_cast<unsigned>(turn)) % 32;
}

// "threads 0-31 wait in sync_block at a.cu:3; threads 32-63 have ended"
std::string who_waits() {
  std::string text;
  for (unsigned from = 0, to; from < machine.threads; from = to) {
    const Thread& first = threads[from];
    for (to = from + 1; to < machine.threads; ++to) {
      const Thread& t = threads[to];
      if (t.state != first.state) break;
      if (t.state != State::ended && (t.doing != first.doing || !same_place(t.at, first.at))) break;
    }
    text += text.empty() ? "" : "; ";
    text +=
        to - from == 1 ? "thread " + std::to_string(from) : "threads " + std::to_string(from) + "-" + std::to_string(to - 1);
    text += first.state == State::ended ? " ended" : std::string(" in ") + first.doing + " at " + describe(first.at);
  }
  return text;
}

// The thread that goes on; null if none can.
Thread* next_thread(unsigned warp) {
  const std::uint32_t chance = random_order.next();
  if (machine.warps[warp].ready == 0 || chance % kWarpSteps == 0) {
    if (block.ready_warps == 0) return nullptr;
    warp = pick(block.ready_warps, chance >> 8);
  }
  return &threads[warp * kLanes + pick(machine.warps[warp].ready, chance >> 16)];
}

[[noreturn]] void deadlock() {
  const Thread* const waits =
      std::find_if(threads, threads + machine.threads, [](const Thread& t) { return t.state != State::ended; });
  fault(waits->at, "deadlock: " + who_waits());
}

void set_waiting() {
  Warp& w = machine.warps[machine.self->warp];
  w.ready &= ~(1u << machine.self->lane);
  if (w.ready == 0) block.ready_warps &= ~(1u << machine.self->warp);
}
void set_ready(unsigned warp) {
  machine.warps[warp].ready = ~0u;
  block.ready_warps |= 1u << warp;
}

void yield() {
  Thread* const self = machine.self;
  if (++block.meetings > machine.most_meetings) fault(self->at, "this block does not end");
  Thread* const next = next_thread(self->warp);
  if (!next) deadlock();
  if (next != self) {
    machine.self = next;
    switch_context(self->context, next->context);
  }
  self->state = State::ready;
}

// A thread's whole life. Whatever it throws ends the block; the other fibers stay where they are and are forgotten.
void live() {
  enter_context();
  try {
    block.body.call(block.body.closure);
    check_no_copies_left();
    Thread* const self = machine.self;
    self->state = State::ended;
    set_waiting();
    if (--block.alive > 0) {
      Thread* const next = next_thread(self->warp);
      if (!next) deadlock();
      machine.self = next;
      leave_context(self->context, next->context);
    }
  } catch (const std::exception& e) {
    block.failure = e.what();
  } catch (...) {
    block.failure = "a kernel threw something";
  }
  leave_context(machine.self->context, block.outside);
}

void run_block(std::uint64_t index) {
  Machine& m = machine;
  m.block_x = static_cast<unsigned>(index % m.grid_x);
  m.block_y = static_cast<unsigned>(index / m.grid_x % m.grid_y);
  m.block_z = static_cast<unsigned>(index / m.grid_x / m.grid_y);
  m.block_start = m.block_since = ++m.clock;
  std::memset(m.shared, 0xff, m.shared_bytes);  // NaN in every type
  const unsigned warps = m.threads / kLanes;
  block.ready_warps = 0;
  block.alive = m.threads;
  block.at_barrier = 0;
  block.meetings = 0;
  block.failure.clear();
  for (unsigned w = 0; w < warps; ++w) {
    m.warps[w].arrived = 0;
    m.warps[w].since = m.clock;
    set_ready(w);
  }
  for (unsigned i = 0; i < m.threads; ++i) {
    Thread& t = threads[i];
    t.id = i, t.lane = i % kLanes, t.warp = i / kLanes;
    t.state = State::ready;
    t.copies.clear();
    t.groups = 0;
    prepare_context(t.context, i, live);
  }
  m.self = next_thread(random_order.next() % warps);
  switch_context(block.outside, m.self->context);
  m.self = nullptr;
  if (m.count_traffic) {
    for (unsigned w = 0; w < warps; ++w) count_logged(w);
  }
  if (!block.failure.empty()) throw Fault(block.failure);
}

// 128-byte aligned and no better, as the contract says.
char* shared_buffer() {
  alignas(256) static char buffer[128 + kMaxSharedBytes];
  return buffer + 128;
}

void check_grid(const Grid& grid) {
  const auto refuse = [&](const std::string& rule, unsigned got) {
    throw Fault(std::string("launch of ") + grid.name + ": " + rule + ", got " + std::to_string(got));
  };
  if (grid.x < 1 || grid.x > 0x7fffffff) refuse("grid.x must be 1 to 2^31 - 1", grid.x);
  if (grid.y < 1 || grid.y > 65535) refuse("grid.y must be 1 to 65535", grid.y);
  if (grid.z < 1 || grid.z > 65535) refuse("grid.z must be 1 to 65535", grid.z);
  if (grid.threads < 1 || grid.threads > kMaxThreads) refuse("threads must be 1 to 1024", grid.threads);
  if (grid.threads % kLanes) refuse("threads must be a multiple of 32: all lanes take part in collectives", grid.threads);
  if (grid.shared_bytes > kMaxSharedBytes) refuse("shared_bytes must be at most 227 KiB", grid.shared_bytes);
}

}  // namespace

void set_seed(std::uint64_t seed) {
  seed_value() = seed;
}
std::uint64_t seed() {
  return seed_value();
}

void tick_warp(unsigned warp) {
  machine.warps[warp].since = ++machine.clock;
}

void join_warp(const char* doing, Complete complete, void* operand, const Location& at) {
  Thread& self = *machine.self;
  Warp& w = machine.warps[self.warp];
  if (w.arrived == 0) {
    w.complete = complete;
    w.at = at;
  } else if (w.complete != complete || !same_place(w.at, at)) {
    fault(at, std::string(doing) + ": all 32 lanes must take part, but others of the warp wait at " + describe(w.at));
  }
  w.operands[self.lane] = operand;
  self.state = State::in_warp;
  self.doing = doing;
  self.at = at;
  if (++w.arrived < kLanes) {
    set_waiting();
  } else {
    w.arrived = 0;
    if (machine.count_traffic) count_logged(self.warp);
    complete(w.operands, at);
    set_ready(self.warp);
  }
  yield();
}

void join_block(const Location& at) {
  Thread& self = *machine.self;
  if (block.at_barrier == 0) {
    block.barrier = at;
  } else if (!same_place(block.barrier, at)) {
    fault(at, "sync_block: all threads must take part, but others wait at " + describe(block.barrier));
  }
  self.state = State::in_block;
  self.doing = "sync_block";
  self.at = at;
  if (++block.at_barrier < machine.threads) {
    set_waiting();
  } else {
    block.at_barrier = 0;
    ++counts().sync_block;
    machine.block_since = ++machine.clock;
    for (unsigned w = 0; w < machine.threads / kLanes; ++w) {
      machine.warps[w].since = machine.clock;
      if (machine.count_traffic) count_logged(w);
      set_ready(w);
    }
  }
  yield();
}

void run(const Grid& grid, Body body) {
  static std::mutex one_launch;
  const std::lock_guard lock(one_launch);
  check_grid(grid);
  Machine& m = machine;
  m.kernel = grid.name;
  m.grid_x = grid.x, m.grid_y = grid.y, m.grid_z = grid.z;
  m.threads = grid.threads, m.shared_bytes = grid.shared_bytes;
  m.shared = shared_buffer();
  block.body = body;
  begin_launch_of_buffers();
  begin_counts(grid.name);
  forget_logged();
  if (m.clock > UINT32_MAX / 2) {
    m.clock = 0;
    ++m.clock_age;
  }
  m.launch_start = ++m.clock;
  random_order.state = seed();
  random_order.next();

  KernelReport& report = counts();
  ++report.launches;
  report.threads = std::max(report.threads, grid.threads);
  report.shared_bytes = std::max(report.shared_bytes, grid.shared_bytes);
  // Blocks in an order of chance: every stride that shares no factor with their number meets each once.
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  std::uint64_t stride = random_order.next() % blocks;
  while (std::gcd(stride, blocks) != 1) stride = (stride + 1) % blocks;
  std::uint64_t index = random_order.next() % blocks;
  for (std::uint64_t i = 0; i < blocks; ++i) {
    m.count_traffic = i < m.counted_blocks;
    run_block(index);
    ++report.blocks;
    index = (index + stride) % blocks;
  }
}

}  // namespace sparseprune::simt
