#include "host/report.h"

#include <string_view>

#include "host/machine.h"

namespace sparseprune::simt {

const char site_anchor = 0;

namespace {

std::map<std::string, KernelReport>& all() {
  static std::map<std::string, KernelReport> reports;
  return reports;
}
KernelReport* current = nullptr;

}  // namespace

std::string describe(const Location& at) {
  if (site_of(at) == 0) return "*p, line unknown";
  std::string_view file = at.file_name();
  for (const std::string_view root : {"/csrc/", "/tests/"}) {
    const std::size_t place = file.rfind(root);
    if (place != std::string_view::npos) {
      file.remove_prefix(place + 1);
      break;
    }
  }
  return std::string(file) + ":" + std::to_string(at.line());
}

void fault(const Location& at, const std::string& what) {
  std::string text = what + ", at " + describe(at);
  if (const Thread* t = machine.self) {
    const auto n = [](unsigned v) { return std::to_string(v); };
    text += "; kernel " + std::string(machine.kernel) + ", block (" + n(machine.block_x) + ", " + n(machine.block_y) + ", " +
            n(machine.block_z) + ") of (" + n(machine.grid_x) + ", " + n(machine.grid_y) + ", " + n(machine.grid_z) +
            "), thread " + n(t->id) + " (warp " + n(t->warp) + ", lane " + n(t->lane) + ")";
  }
  throw Fault(text + "; SPARSEPRUNE_SIMT_SEED=" + std::to_string(seed()));
}

KernelReport& counts() {
  return *current;
}
void begin_counts(const std::string& kernel) {
  current = &all()[kernel];
}
const std::map<std::string, KernelReport>& reports() {
  return all();
}
void clear_reports() {
  all().clear();
  current = nullptr;
}

}  // namespace sparseprune::simt
