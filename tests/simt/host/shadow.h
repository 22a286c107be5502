// Who touched which bytes, and when. A record holds for 4 bytes, or, once threads share the 4, for each of them.
//
// Of the reads since the last write a record keeps one reader, or that several lanes of one warp read, or several warps:
// enough to know whether all of them come before a write. Stamps of the clock date everything, so that nothing is reset when
// a block or a launch begins: an older stamp is not a stamp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "host/machine.h"
#include "host/site.h"

namespace sparseprune::simt {

struct FreeMemory {
  void operator()(void* p) const;
};

class Shadow {
 public:
  enum class Access : std::uint8_t { read, read_by_warp, read_once, write, issue_copy, atomic };

  Shadow(Space space, std::size_t bytes);

  // The running thread's access; faults where it is not ordered, or, in shared memory, reads what nobody wrote.
  void access(Access access, std::size_t offset, unsigned bytes, Site site);
  // 16 bytes whose copy was issued by the running thread have arrived.
  void land(std::size_t offset);

 private:
  struct Record {
    std::uint32_t written, read;
    std::uint16_t writer, reader;
    Site write_site, read_site;
  };

  void forget();
  void access_bytes(Access access, std::size_t offset, unsigned bytes, Site site);
  void check(Record& r, Access access, std::size_t offset, Site site);
  [[noreturn]] void conflict(const Record& r, Access access, bool with_write, std::size_t offset, Site site) const;

  Space space_;
  std::uint32_t clock_age_;  // stamps of another are void
  std::size_t words_;
  std::unique_ptr<Record[], FreeMemory> word_, byte_;  // byte_: from the first shared word on
};

}  // namespace sparseprune::simt
