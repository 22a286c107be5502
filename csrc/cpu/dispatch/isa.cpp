#include "cpu/dispatch/isa.h"

#include <atomic>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <stdexcept>

#include "cpu/dispatch/family.h"

namespace sparseprune {
namespace {

// A level in its chain; `below` is where its table starts from.
struct Link {
  Link(const Level* it, const Link* lower, bool here) : level(it), below(lower), is_here(here) {
  }

  const Level* const level;
  const Link* const below;
  const bool is_here;
  KernelTable table{};
  std::once_flag built;
};

bool always() {
  return true;
}
constexpr Level kScalar{"scalar", scalar::install, always, "nothing"};

// scalar first, then family by family; each ascends. A level is here if those below it are.
std::deque<Link>& links() {
  static std::deque<Link> all = [] {
    std::deque<Link> made;
    const Link* const scalar = &made.emplace_back(&kScalar, nullptr, true);
    for (const Family* family : {&kX86}) {
      const Link* below = scalar;
      for (int i = 0; i < family->count; ++i) {
        const Level& level = family->levels[i];
        below = &made.emplace_back(&level, below, below->is_here && level.is_here());
      }
    }
    return made;
  }();
  return all;
}

Link& best() {
  Link* found = &links().front();
  for (Link& link : links()) {
    if (link.is_here && link.level->install) found = &link;
  }
  return *found;
}

std::string list(const std::vector<std::string>& names) {
  std::string s;
  for (const auto& n : names) s += (s.empty() ? "" : ", ") + n;
  return s;
}

Link& parse(const std::string& name) {
  std::vector<std::string> all;
  for (Link& link : links()) {
    const Level& level = *link.level;
    all.emplace_back(level.name);
    if (name != level.name) continue;
    if (!level.install) {
      throw std::invalid_argument("SPARSEPRUNE_ISA: this build has no kernels for '" + name + "' (it needs " + level.needs +
                                  "); built: " + list(isas_built()));
    }
    if (!link.is_here) {
      throw std::invalid_argument("SPARSEPRUNE_ISA: this CPU or its OS lacks '" + name + "' (" + level.needs +
                                  "); available here: " + list(isas_available()));
    }
    return link;
  }
  throw std::invalid_argument("SPARSEPRUNE_ISA: must be one of " + list(all) + ", got '" + name + "'");
}

void install(const Link& link, KernelTable& table) {
  if (link.below) install(*link.below, table);
  if (link.level->install) link.level->install(table);
}

const KernelTable& table_of(Link& link) {
  std::call_once(link.built, [&link] { install(link, link.table); });
  return link.table;
}

std::atomic<const KernelTable*> g_table{nullptr};

}  // namespace

std::vector<std::string> isas_built() {
  std::vector<std::string> names;
  for (const Link& link : links()) {
    if (link.level->install) names.emplace_back(link.level->name);
  }
  return names;
}

std::vector<std::string> isas_available() {
  std::vector<std::string> names;
  for (const Link& link : links()) {
    if (link.level->install && link.is_here) names.emplace_back(link.level->name);
  }
  return names;
}

const KernelTable& kernels() {
  const KernelTable* table = g_table.load(std::memory_order_acquire);
  if (table) return *table;
  const char* forced = std::getenv("SPARSEPRUNE_ISA");
  table = &table_of(forced && *forced ? parse(forced) : best());
  g_table.store(table, std::memory_order_release);
  return *table;
}

void set_isa(const std::string& name) {
  g_table.store(&table_of(parse(name)), std::memory_order_release);
}

}  // namespace sparseprune
