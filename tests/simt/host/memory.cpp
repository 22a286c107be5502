#include "host/memory.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "host/machine.h"
#include "host/report.h"
#include "host/traffic.h"

namespace sparseprune::simt {

namespace {

struct Registered {
  std::unique_ptr<Extent> extent;
  bool before_launch;  // registered since the last launch began
};

// Disjoint, by address. A launcher may hold pointers made before others were registered: what was replaced is kept in `old`
// until the launch. Each thread has its own: it registers what it launches with, while another clears.
struct Registry {
  std::map<std::uintptr_t, Registered> live;
  std::vector<std::unique_ptr<Extent>> old;
};
Registry& registry() {
  thread_local Registry r;
  return r;
}

const Extent nowhere{0, 0, false, nullptr};

std::uintptr_t address_of(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p);
}

// Offset of the access in the extent.
std::size_t check_global(const Extent* extent, const void* p, unsigned bytes, unsigned align, const char* what,
                         const Location& at) {
  const std::uintptr_t a = address_of(p);
  if (extent && a >= extent->begin && a + bytes <= extent->end && (a & (align - 1)) == 0) return a - extent->begin;
  const std::string access = std::string("global memory, ") + what + " of " + std::to_string(bytes) + " bytes: ";
  if (!extent) fault(at, access + "null pointer");
  if (extent == &nowhere) fault(at, access + "the address is in no buffer of this launch");
  const auto offset = static_cast<std::intptr_t>(a - extent->begin);
  const std::string place =
      "byte " + std::to_string(offset) + " of a buffer of " + std::to_string(extent->end - extent->begin);
  if (a < extent->begin || a + bytes > extent->end) fault(at, access + "out of bounds, " + place);
  fault(at, access + "misaligned, " + place + ", address not a multiple of " + std::to_string(align));
}

Shadow& shadow_of(const Extent* extent) {
  auto& shadow = const_cast<Extent*>(extent)->shadow;
  if (!shadow) shadow = std::make_unique<Shadow>(Space::global, extent->end - extent->begin);
  return *shadow;
}

void access_global(const Extent* extent, const void* p, unsigned bytes, unsigned align, Shadow::Access access,
                   const char* what, const Location& at) {
  const std::size_t offset = check_global(extent, p, bytes, align, what, at);
  if (machine.count_traffic) log_access(Space::global, address_of(p), bytes, site_of(at));
  if (extent->writable) {
    shadow_of(extent).access(access, offset, bytes, site_of(at));
  } else if (access == Shadow::Access::write || access == Shadow::Access::atomic) {
    fault(at, std::string("global memory, ") + what + ": the buffer is an input");
  }
}

Shadow shared_shadow(Space::shared, kMaxSharedBytes);

std::size_t check_shared(const void* p, unsigned bytes, unsigned align, const char* what, const Location& at) {
  const std::uintptr_t offset = address_of(p) - address_of(machine.shared);
  if (offset < machine.shared_bytes && offset + bytes <= machine.shared_bytes && (offset & (align - 1)) == 0) return offset;
  const std::string access = std::string("shared memory, ") + what + " of " + std::to_string(bytes) + " bytes: ";
  const std::string place =
      "byte " + std::to_string(static_cast<std::intptr_t>(offset)) + " of " + std::to_string(machine.shared_bytes);
  if (!p) fault(at, access + "null pointer");
  if (offset >= machine.shared_bytes || offset + bytes > machine.shared_bytes) fault(at, access + "out of bounds, " + place);
  fault(at, access + "misaligned, " + place + ", not a multiple of " + std::to_string(align));
}

}  // namespace

void register_buffer(const void* address, std::size_t bytes, bool writable) {
  if (bytes == 0) return;
  Registry& r = registry();
  std::uintptr_t begin = address_of(address), end = begin + bytes;
  auto i = r.live.lower_bound(begin);
  if (i != r.live.begin() && std::prev(i)->second.extent->end > begin) --i;
  while (i != r.live.end() && i->first < end) {
    const Extent& overlapping = *i->second.extent;
    if (!i->second.before_launch) {
      begin = std::min(begin, overlapping.begin), end = std::max(end, overlapping.end);
      writable = writable || overlapping.writable;
    }
    r.old.push_back(std::move(i->second.extent));
    i = r.live.erase(i);
  }
  r.live.emplace(begin, Registered{std::make_unique<Extent>(Extent{begin, end, writable, nullptr}), false});
}

void clear_buffers() {
  Registry& r = registry();
  r.live.clear();
  r.old.clear();
}

const Extent* find_extent(const void* address) {
  if (!address) return nullptr;
  Registry& r = registry();
  auto i = r.live.upper_bound(address_of(address));
  if (i == r.live.begin()) return &nowhere;
  const Extent& extent = *std::prev(i)->second.extent;
  return address_of(address) <= extent.end ? &extent : &nowhere;
}

void begin_launch_of_buffers() {
  Registry& r = registry();
  for (auto& [begin, registered] : r.live) registered.before_launch = true;
  r.old.clear();
}

void read_global(const Extent* extent, const void* p, unsigned bytes, unsigned align, const Location& at) {
  access_global(extent, p, bytes, align, Shadow::Access::read, "read", at);
}
void read_global_once(const Extent* extent, const void* p, unsigned bytes, unsigned align, const Location& at) {
  access_global(extent, p, bytes, align, Shadow::Access::read_once, "load_stream", at);
}
void write_global(const Extent* extent, void* p, unsigned bytes, unsigned align, const Location& at) {
  access_global(extent, p, bytes, align, Shadow::Access::write, "write", at);
}
void atomic_global(const Extent* extent, void* p, unsigned bytes, unsigned align, const Location& at) {
  access_global(extent, p, bytes, align, Shadow::Access::atomic, "atomic", at);
}

void read_shared(const void* p, unsigned bytes, unsigned align, const Location& at) {
  const std::size_t offset = check_shared(p, bytes, align, "read", at);
  shared_shadow.access(Shadow::Access::read, offset, bytes, site_of(at));
  if (machine.count_traffic) log_access(Space::shared, offset, bytes, site_of(at));
}
void write_shared(void* p, unsigned bytes, unsigned align, const Location& at) {
  const std::size_t offset = check_shared(p, bytes, align, "write", at);
  shared_shadow.access(Shadow::Access::write, offset, bytes, site_of(at));
  if (machine.count_traffic) log_access(Space::shared, offset, bytes, site_of(at));
}

void read_rows(const void* const* rows, unsigned count, const Location& at) {
  std::uintptr_t offsets[kLanes];
  for (unsigned i = 0; i < count; ++i) {
    const std::size_t offset = check_shared(rows[i], 16, 16, "ldmatrix row", at);
    shared_shadow.access(Shadow::Access::read_by_warp, offset, 16, site_of(at));
    offsets[i] = offset;
  }
  if (machine.count_traffic) count_rows(offsets, count, site_of(at));
}

void issue_copy(void* dst, const Extent* extent, const void* src, int bytes, const Location& at) {
  if (bytes < 0 || bytes > 16) fault(at, "cp.async: bytes must be 0 to 16, got " + std::to_string(bytes));
  const std::size_t offset = check_shared(dst, 16, 16, "cp.async", at);
  if (bytes > 0) {
    check_global(extent, src, static_cast<unsigned>(bytes), 16, "cp.async", at);
    if (machine.count_traffic) log_access(Space::global, address_of(src), static_cast<unsigned>(bytes), site_of(at));
    if (extent->writable) {
      shadow_of(extent).access(Shadow::Access::read, address_of(src) - extent->begin, static_cast<unsigned>(bytes),
                               site_of(at));
    }
  }
  shared_shadow.access(Shadow::Access::issue_copy, offset, 16, site_of(at));
  if (machine.count_traffic) log_access(Space::shared, offset, 16, site_of(at));
  Thread& t = *machine.self;
  t.copies.push_back(
      {static_cast<char*>(dst), static_cast<const char*>(src), static_cast<unsigned>(bytes), t.groups, site_of(at)});
  ++counts().cp_async;
}

void land_copies(unsigned youngest) {
  Thread& t = *machine.self;
  std::size_t landed = 0;
  for (; landed < t.copies.size() && t.copies[landed].group + youngest < t.groups; ++landed) {
    const Copy& c = t.copies[landed];
    std::memset(c.dst, 0, 16);
    if (c.bytes) std::memcpy(c.dst, c.src, c.bytes);
    shared_shadow.land(static_cast<std::size_t>(c.dst - machine.shared));
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

void check_no_copies_left() {
  const Thread& t = *machine.self;
  if (t.copies.empty()) return;
  const Copy& c = t.copies.front();
  const bool committed = c.group < t.groups;
  fault(location_of(c.site), std::string("cp.async: ") + (committed ? "not waited for" : "never committed") +
                                 " when its thread ends; " + std::to_string(t.copies.size()) + " such");
}

}  // namespace sparseprune::simt
