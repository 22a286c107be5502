// Where in a kernel's source something happens, and the fault that tells it.
#pragma once

#include <bit>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

namespace sparseprune::simt {

using Location = std::source_location;

// A location in 32 bits, as records of memory keep it: the distance of its constant from one of ours in the same module.
// 0: unknown (*p has no place for a location).
using Site = std::int32_t;
static_assert(sizeof(Location) == sizeof(std::uintptr_t), "a location is a pointer to a constant");
extern const char site_anchor;

inline Site site_of(const Location& at) {
  const auto constant = std::bit_cast<std::uintptr_t>(at);
  return constant == 0 ? 0 : static_cast<Site>(constant - reinterpret_cast<std::uintptr_t>(&site_anchor));
}
inline Location location_of(Site site) {
  const auto distance = static_cast<std::uintptr_t>(static_cast<std::intptr_t>(site));
  return std::bit_cast<Location>(site == 0 ? 0 : reinterpret_cast<std::uintptr_t>(&site_anchor) + distance);
}
std::string describe(const Location& at);  // "csrc/cuda/convert/convert.cu:12"
inline std::string describe(Site site) {
  return describe(location_of(site));
}

// Ends the launch. `launch` throws it on to its caller.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// Adds the place in the source, kernel, block, thread and seed to `what`.
[[noreturn]] void fault(const Location& at, const std::string& what);

}  // namespace sparseprune::simt
