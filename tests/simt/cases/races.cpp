// Random programs of reads, writes and barriers: the checker must fault exactly where two accesses of a byte, one of them a
// write, are not ordered, or shared memory is read that nobody has written; whatever the order in which threads run.
#include <algorithm>
#include <random>
#include <vector>

#include "test_simt.h"

namespace sparseprune::simt::test {

namespace {

constexpr int kThreads = 96, kBytes = 32;

enum class Barrier : int { none, warp, block };

struct Access {
  int thread, offset, size, write, phase;
};

template <typename P>
SP_DEVICE void access(P p, const Access& a) {
  const auto at = p + a.offset;
  if (a.write) {
    if (a.size == 1) store(at, std::uint8_t{1});
    if (a.size == 2) store(at, std::uint16_t{1});
    if (a.size == 4) store(at, std::uint32_t{1});
    if (a.size == 16) store(at, u32x4{1, 1, 1, 1});
  } else {
    if (a.size == 1) load<std::uint8_t>(at);
    if (a.size == 2) load<std::uint16_t>(at);
    if (a.size == 4) load<std::uint32_t>(at);
    if (a.size == 16) load<u32x4>(at);
  }
}

SP_KERNEL program_kernel(Global<const Access> accesses, int n, Global<const int> barriers, int phases,
                         Global<std::uint8_t> memory) {
  for (int phase = 0; phase < phases; ++phase) {
    for (int i = 0; i < n; ++i) {
      const Access a = accesses[i];
      if (a.phase != phase || a.thread != static_cast<int>(thread_x())) continue;
      if (memory) {
        access(memory, a);
      } else {
        access(shared_memory<std::uint8_t>(0), a);
      }
    }
    const auto barrier = static_cast<Barrier>(static_cast<int>(barriers[phase]));
    if (barrier == Barrier::warp) sync_warp();
    if (barrier == Barrier::block) sync_block();
    if (barrier == Barrier::none) ballot(true);
  }
}

// Whether every path from one access to the other, the later phase, passes a barrier of both threads.
bool ordered(const Access& a, const Access& b, const std::vector<int>& barriers) {
  if (a.thread == b.thread) return true;
  for (int phase = std::min(a.phase, b.phase); phase < std::max(a.phase, b.phase); ++phase) {
    const auto barrier = static_cast<Barrier>(barriers[static_cast<std::size_t>(phase)]);
    if (barrier == Barrier::block || (barrier == Barrier::warp && a.thread / 32 == b.thread / 32)) return true;
  }
  return false;
}

bool is_wrong(const std::vector<Access>& accesses, const std::vector<int>& barriers, bool shared) {
  const auto holds = [](const Access& a, int byte) { return a.offset <= byte && byte < a.offset + a.size; };
  for (int byte = 0; byte < kBytes; ++byte) {
    for (std::size_t i = 0; i < accesses.size(); ++i) {
      const Access& a = accesses[i];
      if (!holds(a, byte)) continue;
      bool written = a.write || !shared;
      for (std::size_t k = 0; k < accesses.size(); ++k) {
        const Access& b = accesses[k];
        if (!holds(b, byte)) continue;
        if ((a.write || b.write) && !ordered(a, b, barriers)) return true;
        written = written || (b.write && (b.phase < a.phase || (b.phase == a.phase && k < i)));
      }
      if (!written) return true;
    }
  }
  return false;
}

}  // namespace

void test_races() {
  std::mt19937 random(static_cast<std::uint32_t>(seed()));
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  int wrong = 0, right = 0;
  for (int program = 0; program < 400; ++program) {
    const bool shared = program % 2 == 0;
    // Few threads, so that they meet.
    const int few[] = {0, 1, 2, 40, 41, 70};
    const int phases = 3 + below(5), n = 3 + below(6);
    std::vector<int> barriers;
    for (int i = 0; i < phases; ++i) barriers.push_back(below(3));
    std::vector<Access> accesses;
    if (shared && below(8)) {  // all is written first: what follows is more likely to be right
      accesses = {{0, 0, 16, 1, 0}, {0, 16, 16, 1, 0}};
      barriers[0] = static_cast<int>(Barrier::block);
    }
    const int first = accesses.empty() ? 0 : 1, range = below(2) ? 8 : kBytes;
    for (int i = 0; i < n; ++i) {
      constexpr int kSizes[] = {1, 2, 4, 16};
      const int size = range == 8 ? kSizes[below(3)] : kSizes[below(4)];
      accesses.push_back({few[below(6)], below(range / size) * size, size, below(3) == 0, first + below(phases - first)});
    }
    const bool want = is_wrong(accesses, barriers, shared);
    ++(want ? wrong : right);

    clear_buffers();
    std::vector<u32x4> memory(kBytes / 16);
    register_buffer(accesses.data(), accesses.size() * sizeof(Access), false);
    register_buffer(barriers.data(), barriers.size() * sizeof(int), false);
    register_buffer(memory.data(), kBytes, true);
    std::string message;
    try {
      launch(grid(kThreads, kBytes), program_kernel, accesses.data(), static_cast<int>(accesses.size()), barriers.data(),
             phases, shared ? nullptr : reinterpret_cast<std::uint8_t*>(memory.data()));
    } catch (const Fault& f) {
      message = f.what();
    }
    expect(message.empty() != want, "program " + std::to_string(program) + (want ? " must fault" : " must not: " + message));
  }
  expect(wrong > 50 && right > 50, "both kinds of programs: " + std::to_string(wrong) + " wrong, " + std::to_string(right));
}

}  // namespace sparseprune::simt::test
