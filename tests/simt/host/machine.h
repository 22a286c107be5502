// One block at a time, its threads fibers: who runs, who waits, and which accesses are ordered.
//
// Order is kept by one clock, which ticks at every barrier. An access is stamped with the clock; it comes before another
// thread's access if a barrier that both pass has ticked since: a barrier of the block, or of the warp they share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "host/fiber.h"
#include "host/site.h"

namespace sparseprune::simt {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxSharedBytes = 227 * 1024;

struct Grid;

enum class Space : std::uint8_t { shared, global };

// A cp.async that has not landed. From `bytes` on the 16 are zero.
struct Copy {
  char* dst;
  const char* src;
  unsigned bytes;
  unsigned group;
  Site site;
};

enum class State : std::uint8_t { ready, in_warp, in_block, ended };

struct Thread {
  Context context;
  unsigned id, lane, warp;
  State state;
  const char* doing;  // what it waits in
  Location at;
  std::vector<Copy> copies;  // in the order of issue
  unsigned groups;           // committed
};

// What all lanes of a warp do together. The last lane to arrive does it for all, given what each lane brought.
using Complete = void (*)(void* const (&operands)[kLanes], const Location& at);

struct Warp {
  std::uint32_t ready;  // lanes that can run, the running one among them
  unsigned arrived;
  Complete complete;
  Location at;
  void* operands[kLanes];
  std::uint32_t since;  // clock at its last barrier, of the warp or the block
};

struct Machine {
  Thread* self = nullptr;  // the running thread; null outside of a kernel
  unsigned block_x = 0, block_y = 0, block_z = 0;
  unsigned grid_x = 0, grid_y = 0, grid_z = 0;
  unsigned threads = 0, shared_bytes = 0;
  const char* kernel = "";
  char* shared = nullptr;
  Warp warps[kMaxThreads / kLanes];

  std::uint32_t clock = 1, clock_age = 0;  // of age 1 the second clock, after the first has nearly run out
  std::uint32_t launch_start = 1, block_start = 1, block_since = 1;  // block_since: the last barrier of the block
  bool count_traffic = false;
  unsigned counted_blocks = 1;  // of a launch: the traffic of others is much the same, and counting takes time

  // Arrivals at barriers and collectives, of all threads of a block, after which it is said not to end. Some seconds; a real
  // kernel's block has thousands to millions.
  std::uint64_t most_meetings = 100'000'000;
};
extern Machine machine;

// The running thread arrives at a warp's collective and leaves when all have. `doing` names it.
void join_warp(const char* doing, Complete complete, void* operand, const Location& at);
void join_block(const Location& at);
void tick_warp(unsigned warp);  // its lanes' accesses so far come before those to follow

// The kernel, with its arguments bound.
struct Body {
  void (*call)(void* closure);
  void* closure;
};
// Throws Fault.
void run(const Grid& grid, Body body);

void set_seed(std::uint64_t seed);
std::uint64_t seed();

}  // namespace sparseprune::simt
