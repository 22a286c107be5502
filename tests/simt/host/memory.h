// Checked memory: which buffers there are, and whether an access is within one, aligned, and ordered with the others'.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "host/shadow.h"
#include "host/site.h"

namespace sparseprune::simt {

// A buffer that kernels may touch.
struct Extent {
  std::uintptr_t begin, end;
  bool writable;
  std::unique_ptr<Shadow> shadow;  // of a writable one, from its first access on
};

// By thread. A range registered anew takes the place of those it overlaps that were registered before the last launch
// (memory that has been used again). Those registered since, views of one storage, become one with it; it is writable if one
// of them is.
void register_buffer(const void* address, std::size_t bytes, bool writable);
void clear_buffers();
// The one that holds `address`, or else ends there; null for null; for any other an extent that holds nothing.
const Extent* find_extent(const void* address);
void begin_launch_of_buffers();

// Of the running thread. A fault says what is wrong.
void read_global(const Extent* extent, const void* p, unsigned bytes, unsigned align, const Location& at);
void read_global_once(const Extent* extent, const void* p, unsigned bytes, unsigned align, const Location& at);
void write_global(const Extent* extent, void* p, unsigned bytes, unsigned align, const Location& at);
void atomic_global(const Extent* extent, void* p, unsigned bytes, unsigned align, const Location& at);
void read_shared(const void* p, unsigned bytes, unsigned align, const Location& at);
void write_shared(void* p, unsigned bytes, unsigned align, const Location& at);

void issue_copy(void* dst, const Extent* extent, const void* src, int bytes, const Location& at);
void land_copies(unsigned youngest);  // all groups but the youngest
void check_no_copies_left();

// The rows of an ldmatrix: read by the warp, whichever lane names them.
void read_rows(const void* const* rows, unsigned count, const Location& at);

}  // namespace sparseprune::simt
