#include "host/shadow.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

namespace sparseprune::simt {

namespace {

// Who, in 16 bits: a thread, one warp's lanes (reads), several warps (reads), another block among them (reads).
constexpr std::uint16_t kThread = 0x03ff, kWarp = 0x0400, kMany = 0x0800, kBlocks = 0x1000;
// Of a writer.
constexpr std::uint16_t kInFlight = 0x1000, kAtomic = 0x2000, kSplit = 0x4000;  // kSplit: see the bytes' records

int warp_of(std::uint16_t who) {
  if (who & kMany) return -1;
  return who & kWarp ? who & 31 : (who & kThread) / 32;
}

// Untouched pages of it cost nothing.
template <typename T>
T* zeroed(std::size_t n) {
  void* p = std::calloc(std::max<std::size_t>(n, 1), sizeof(T));
  if (!p) throw std::bad_alloc();
  return static_cast<T*>(p);
}

std::string name_of(std::uint16_t who) {
  if (who & kBlocks) return "several blocks";
  if (who & kMany) return "several warps";
  if (who & kWarp) return "warp " + std::to_string(who & 31);
  return "thread " + std::to_string(who & kThread);
}

}  // namespace

void FreeMemory::operator()(void* p) const {
  std::free(p);
}

Shadow::Shadow(Space space, std::size_t bytes)
    : space_(space), clock_age_(machine.clock_age), words_((bytes + 3) / 4), word_(zeroed<Record>(words_)) {
}

void Shadow::forget() {
  word_.reset(zeroed<Record>(words_));
  byte_.reset();
  clock_age_ = machine.clock_age;
}

void Shadow::access(Access access, std::size_t offset, unsigned bytes, Site site) {
  if (clock_age_ != machine.clock_age) forget();
  if ((offset | bytes) & 3) return access_bytes(access, offset, bytes, site);
  const std::uint32_t floor = space_ == Space::shared ? machine.block_start : machine.launch_start;
  for (std::size_t word = offset / 4; word < (offset + bytes) / 4; ++word) {
    Record& r = word_[word];
    if (!(r.writer & kSplit) || r.written < floor) {
      if (r.writer & kSplit) r = Record{};
      check(r, access, word * 4, site);
      continue;
    }
    for (std::size_t i = 0; i < 4; ++i) check(byte_[word * 4 + i], access, word * 4 + i, site);
    if (access == Access::write || access == Access::issue_copy || access == Access::atomic) {
      r = byte_[word * 4];
    } else {
      r.written = machine.clock;
    }
  }
}

void Shadow::access_bytes(Access access, std::size_t offset, unsigned bytes, Site site) {
  if (!byte_) byte_.reset(zeroed<Record>(words_ * 4));
  const std::uint32_t floor = space_ == Space::shared ? machine.block_start : machine.launch_start;
  for (std::size_t i = offset; i < offset + bytes; ++i) {
    Record& r = word_[i / 4];
    if (!(r.writer & kSplit) || r.written < floor) {
      if (r.writer & kSplit) r = Record{};
      std::fill_n(&byte_[i / 4 * 4], 4, r);
      r = Record{};
      r.writer = kSplit;
    }
    r.written = machine.clock;
    check(byte_[i], access, i, site);
  }
}

void Shadow::check(Record& r, Access access, std::size_t offset, Site site) {
  const Machine& m = machine;
  const auto thread = static_cast<std::uint16_t>(m.self->id);
  const auto warp = static_cast<int>(m.self->warp);
  const std::uint32_t floor = space_ == Space::shared ? m.block_start : m.launch_start;
  const std::uint32_t warp_since = m.warps[m.self->warp].since;
  // Whether an access stamped so is ordered before this one. Blocks of a launch never are.
  const auto before = [&](std::uint32_t stamp, std::uint16_t who) {
    if (stamp < floor) return true;
    if (stamp < m.block_start || (who & kBlocks)) return false;
    return stamp < m.block_since || (stamp < warp_since && warp_of(who) == warp);
  };
  const bool writes = access == Access::write || access == Access::issue_copy || access == Access::atomic;
  const bool written = r.written >= floor;

  if (written) {
    const auto writer = static_cast<std::uint16_t>(r.writer & kThread);
    if (r.writer & kInFlight) conflict(r, access, true, offset, site);
    if (access == Access::read_once) conflict(r, access, true, offset, site);
    const bool own =
        writer == thread && r.written >= m.block_start && access != Access::read_by_warp && !(r.writer & kAtomic);
    const bool both_atomic = access == Access::atomic && (r.writer & kAtomic);
    if (!own && !both_atomic && !before(r.written, writer)) conflict(r, access, true, offset, site);
  } else if (space_ == Space::shared && !writes) {
    conflict(r, access, true, offset, site);
  }

  if (writes) {
    const bool own = r.reader == thread && r.read >= m.block_start;
    if (r.read >= floor && !own && !before(r.read, r.reader)) conflict(r, access, false, offset, site);
    r.written = m.clock;
    r.writer = static_cast<std::uint16_t>(thread | (access == Access::issue_copy ? kInFlight : 0) |
                                          (access == Access::atomic ? kAtomic : 0));
    r.write_site = site;
    r.read = 0;
    return;
  }
  const auto reader = static_cast<std::uint16_t>(access == Access::read_by_warp ? kWarp | warp : thread);
  if (before(r.read, r.reader)) {
    r.reader = reader;
  } else if (r.read < m.block_start || (r.reader & kBlocks)) {
    r.reader = kMany | kBlocks;
  } else if (r.reader != reader) {
    r.reader = warp_of(r.reader) == warp ? static_cast<std::uint16_t>(kWarp | warp) : kMany;
  }
  r.read = m.clock;
  r.read_site = site;
}

void Shadow::land(std::size_t offset) {
  for (std::size_t word = offset / 4; word < offset / 4 + 4; ++word) {
    word_[word].writer &= static_cast<std::uint16_t>(~kInFlight);
    word_[word].written = machine.clock;
  }
}

void Shadow::conflict(const Record& r, Access access, bool with_write, std::size_t offset, Site site) const {
  const bool shared = space_ == Space::shared;
  const std::uint32_t floor = shared ? machine.block_start : machine.launch_start;
  std::string what = shared ? "shared memory, byte " : "global memory, byte ";
  what += std::to_string(offset) + ": ";
  switch (access) {
    case Access::read: what += "read"; break;
    case Access::read_by_warp: what += "read by the warp"; break;
    case Access::read_once: what += "load_stream (which may bypass what this kernel writes)"; break;
    case Access::write: what += "written"; break;
    case Access::issue_copy: what += "target of a cp.async"; break;
    case Access::atomic: what += "atomic"; break;
  }
  if (with_write && r.written < floor) fault(location_of(site), what + ", but nobody has written it");
  if (with_write && (r.writer & kInFlight)) {
    fault(location_of(site), what + ", while a cp.async of thread " + std::to_string(r.writer & kThread) +
                                 " to it is under way (" + describe(r.write_site) + "): no wait for its group yet");
  }
  const std::uint32_t stamp = with_write ? r.written : r.read;
  what += with_write ? ", which was written by " : ", which was read by ";
  what += stamp < machine.block_start ? "another block" : name_of(with_write ? r.writer & kThread : r.reader);
  what += " (" + describe(with_write ? r.write_site : r.read_site) + ")";
  what += stamp < machine.block_start ? " of this launch" : " with no barrier since";
  fault(location_of(site), what);
}

}  // namespace sparseprune::simt
