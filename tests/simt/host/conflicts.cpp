#include "host/conflicts.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "host/machine.h"
#include "host/report.h"

namespace sparseprune::simt {

namespace {

constexpr unsigned kBanks = 32;
// A warp that loops this often without a collective is counted up to here.
constexpr unsigned kMostInstructions = 1024;

struct Instruction {
  std::uint32_t lanes = 0;
  std::uint32_t offset[kLanes];
};

struct Log {
  BankConflicts* sum = nullptr;
  unsigned bytes = 0;
  unsigned done[kLanes] = {};  // instructions of each lane
  std::vector<Instruction> instructions;
};

// Of each warp, by site; emptied, not destroyed, until the launch ends: the next block meets the same sites.
std::unordered_map<Site, Log> logs[kMaxThreads / kLanes];
std::unordered_map<Site, BankConflicts*> rows_at;

// Turns of one request: lanes `from` to `to`, of which those in `lanes` take part.
unsigned turns_of(std::uint32_t lanes, const std::uint32_t* offset, unsigned from, unsigned to, unsigned bytes) {
  std::uint32_t words[kLanes * 4];
  unsigned n = 0;
  for (unsigned lane = from; lane < to; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    for (unsigned byte = 0; byte < bytes; byte += 4) words[n++] = (offset[lane] + byte) / 4;
  }
  std::sort(words, words + n);
  n = static_cast<unsigned>(std::unique(words, words + n) - words);
  unsigned bank[kBanks] = {}, most = 0;
  for (unsigned i = 0; i < n; ++i) most = std::max(most, ++bank[words[i] % kBanks]);
  return most;
}

BankConflicts* sum_at(const Location& at) {
  return &counts().conflicts[describe(at)];
}

void add(BankConflicts& c, unsigned turns) {
  if (turns == 0) return;
  ++c.requests;
  c.turns += turns;
  c.worst = std::max(c.worst, turns);
}

}  // namespace

void log_shared(std::size_t offset, unsigned bytes, const Location& at) {
  const Thread& t = *machine.self;
  Log& log = logs[t.warp][site_of(at)];
  unsigned& done = log.done[t.lane];
  if (done == kMostInstructions) return;
  if (!log.sum) log.sum = sum_at(at);
  log.bytes = bytes;
  if (done == log.instructions.size()) log.instructions.emplace_back();
  Instruction& instruction = log.instructions[done++];
  instruction.lanes |= 1u << t.lane;
  instruction.offset[t.lane] = static_cast<std::uint32_t>(offset);
}

void count_logged(unsigned warp) {
  for (auto& [site, log] : logs[warp]) {
    if (log.instructions.empty()) continue;
    const unsigned lanes_a_request = std::min(kLanes, kLanes * 4 / std::max(log.bytes, 4u));
    for (const Instruction& i : log.instructions) {
      for (unsigned lane = 0; lane < kLanes; lane += lanes_a_request) {
        add(*log.sum, turns_of(i.lanes, i.offset, lane, lane + lanes_a_request, log.bytes));
      }
    }
    log.instructions.clear();
    std::fill(std::begin(log.done), std::end(log.done), 0u);
  }
}

void forget_logged() {
  for (auto& warp : logs) warp.clear();
  rows_at.clear();
}

void count_rows(const unsigned* offsets, unsigned count, const Location& at) {
  BankConflicts*& sum = rows_at[site_of(at)];
  if (!sum) sum = sum_at(at);
  for (unsigned row = 0; row < count; row += 8) add(*sum, turns_of(~0u, offsets, row, row + 8, 16));
}

}  // namespace sparseprune::simt
