#include "host/traffic.h"

#include <algorithm>
#include <bit>
#include <unordered_map>
#include <vector>

#include "host/machine.h"
#include "host/report.h"

namespace sparseprune::simt {

namespace {

constexpr unsigned kBanks = 32, kSectorBytes = 32;
// A warp that loops this often without a collective is counted up to here.
constexpr unsigned kMostInstructions = 1024;

struct Instruction {
  std::uint32_t lanes = 0, bytes = 0;  // bytes: of all lanes
  std::uintptr_t address[kLanes];
};

struct Log {
  Traffic* sum = nullptr;
  unsigned bytes = 0;          // of a lane
  unsigned done[kLanes] = {};  // instructions of each lane
  std::vector<Instruction> instructions;
};

// Of each space and warp, by site; emptied, not destroyed, until the launch ends: the next block meets the same sites.
std::unordered_map<Site, Log> logs[2][kMaxThreads / kLanes];
std::unordered_map<Site, Traffic*> rows_at;

Traffic* sum_at(Space space, Site site) {
  KernelReport& r = counts();
  return &(space == Space::shared ? r.shared : r.global)[describe(site)];
}

// Turns of one request to shared memory: of lanes `from` to `to`, those in `lanes` take part.
unsigned turns_of(std::uint32_t lanes, const std::uintptr_t* address, unsigned from, unsigned to, unsigned bytes) {
  std::uintptr_t words[kLanes * 4];
  unsigned n = 0;
  for (unsigned lane = from; lane < to; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    for (unsigned byte = 0; byte < bytes; byte += 4) words[n++] = (address[lane] + byte) / 4;
  }
  std::sort(words, words + n);
  n = static_cast<unsigned>(std::unique(words, words + n) - words);
  unsigned bank[kBanks] = {}, most = 0;
  for (unsigned i = 0; i < n; ++i) most = std::max(most, ++bank[words[i] % kBanks]);
  return most;
}

unsigned sectors_of(const Instruction& i) {
  std::uintptr_t sectors[kLanes];
  unsigned n = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (i.lanes >> lane & 1) sectors[n++] = i.address[lane] / kSectorBytes;  // an aligned access lies in one
  }
  std::sort(sectors, sectors + n);
  return static_cast<unsigned>(std::unique(sectors, sectors + n) - sectors);
}

void add(Traffic& t, unsigned bytes, unsigned units) {
  if (units == 0) return;
  ++t.requests;
  t.bytes += bytes;
  t.units += units;
  t.worst = std::max(t.worst, units);
}

void count(const Log& log, Space space, const Instruction& i) {
  if (space == Space::global) return add(*log.sum, i.bytes, sectors_of(i));
  const unsigned lanes_a_request = std::min(kLanes, kLanes * 4 / std::max(log.bytes, 4u));
  for (unsigned lane = 0; lane < kLanes; lane += lanes_a_request) {
    const std::uint32_t lanes = i.lanes & ~0u >> (kLanes - lanes_a_request) << lane;
    add(*log.sum, static_cast<unsigned>(std::popcount(lanes)) * log.bytes,
        turns_of(lanes, i.address, lane, lane + lanes_a_request, log.bytes));
  }
}

}  // namespace

void log_access(Space space, std::uintptr_t address, unsigned bytes, Site site) {
  const Thread& t = *machine.self;
  Log& log = logs[static_cast<int>(space)][t.warp][site];
  unsigned& done = log.done[t.lane];
  if (done == kMostInstructions) return;
  if (!log.sum) log.sum = sum_at(space, site);
  log.bytes = bytes;
  if (done == log.instructions.size()) log.instructions.emplace_back();
  Instruction& instruction = log.instructions[done++];
  instruction.lanes |= 1u << t.lane;
  instruction.bytes += bytes;
  instruction.address[t.lane] = address;
}

void count_logged(unsigned warp) {
  for (const Space space : {Space::shared, Space::global}) {
    for (auto& [site, log] : logs[static_cast<int>(space)][warp]) {
      if (log.instructions.empty()) continue;
      for (const Instruction& i : log.instructions) count(log, space, i);
      log.instructions.clear();
      std::fill(std::begin(log.done), std::end(log.done), 0u);
    }
  }
}

void forget_logged() {
  for (auto& space : logs) {
    for (auto& warp : space) warp.clear();
  }
  rows_at.clear();
}

void count_rows(const std::uintptr_t* addresses, unsigned count, Site site) {
  Traffic*& sum = rows_at[site];
  if (!sum) sum = sum_at(Space::shared, site);
  for (unsigned row = 0; row < count; row += 8) add(*sum, 128, turns_of(~0u, addresses, row, row + 8, 16));
}

}  // namespace sparseprune::simt
