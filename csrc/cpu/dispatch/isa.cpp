#include "cpu/dispatch/isa.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparseprune {
namespace {

struct Level {
  const char* name;
  void (*install)(KernelTable&);  // null: not in this build
  const char* needs;
};

// Ascending: a level's table starts as the one below it.
constexpr Level kLevels[kIsas] = {
    {"scalar", scalar::install, "nothing"},
#if defined(SPARSEPRUNE_X86)
    {"avx2", avx2::install, "AVX2, FMA, F16C, BMI1/2"},
    {"avx512", avx512::install, "AVX-512 F, BW, CD, DQ, VL"},
    {"avx512_bf16", avx512_bf16::install, "AVX-512 VBMI, VBMI2, VNNI, BF16"},
    {"amx", amx::install, "AMX-TILE, AMX-BF16"},
#else
    {"avx2", nullptr, "x86-64"},
    {"avx512", nullptr, "x86-64"},
    {"avx512_bf16", nullptr, "x86-64"},
    {"amx", nullptr, "x86-64"},
#endif
};

#if defined(__x86_64__)
struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Cpuid(unsigned leaf, unsigned sub) {
    __get_cpuid_count(leaf, sub, &a, &b, &c, &d);
  }
};

unsigned long long read_xcr0() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<unsigned long long>(high) << 32 | low;
}

constexpr bool has(unsigned word, unsigned bits) {
  return (word & bits) == bits;
}

// Linux grants a process the 8 KiB of tile registers only on request.
bool request_amx() {
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

// The highest level whose instructions the CPU has and whose registers the OS saves.
Isa detect() {
  const Cpuid leaf1(1, 0);
  constexpr unsigned kOsxsave = 1u << 27, kAvx = 1u << 28, kFma = 1u << 12, kF16c = 1u << 29, kPopcnt = 1u << 23;
  if (!has(leaf1.c, kOsxsave | kAvx | kFma | kF16c | kPopcnt)) return Isa::scalar;
  const unsigned long long xcr0 = read_xcr0();
  const Cpuid leaf7(7, 0), leaf7_1(7, 1);
  constexpr unsigned kAvx2 = 1u << 5, kBmi = 1u << 3 | 1u << 8;
  if ((xcr0 & 0x6) != 0x6 || !has(leaf7.b, kAvx2 | kBmi)) return Isa::scalar;
  constexpr unsigned kAvx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;  // F, DQ, CD, BW, VL
  if ((xcr0 & 0xe6) != 0xe6 || !has(leaf7.b, kAvx512)) return Isa::avx2;
  constexpr unsigned kVbmi = 1u << 1, kVbmi2 = 1u << 6, kVnni = 1u << 11, kBf16 = 1u << 5;
  if (!has(leaf7.c, kVbmi | kVbmi2 | kVnni) || !has(leaf7_1.a, kBf16)) return Isa::avx512;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((xcr0 & 0x60000) != 0x60000 || !has(leaf7.d, kAmxBf16 | kAmxTile) || !request_amx()) return Isa::avx512_bf16;
  return Isa::amx;
}
#else
Isa detect() {
  return Isa::scalar;
}
#endif

Isa best() {
  static const Isa detected = detect();
  Isa isa = Isa::scalar;
  for (int i = 0; i <= static_cast<int>(detected); ++i) {
    if (kLevels[i].install) isa = static_cast<Isa>(i);
  }
  return isa;
}

std::string list(const std::vector<std::string>& names) {
  std::string s;
  for (const auto& n : names) s += (s.empty() ? "" : ", ") + n;
  return s;
}

Isa parse(const std::string& name) {
  for (int i = 0; i < kIsas; ++i) {
    if (name != kLevels[i].name) continue;
    if (!kLevels[i].install) {
      throw std::invalid_argument("SPARSEPRUNE_ISA: this build has no kernels for '" + name + "' (it needs " +
                                  kLevels[i].needs + "); built: " + list(isas_built()));
    }
    if (i > static_cast<int>(best())) {
      throw std::invalid_argument("SPARSEPRUNE_ISA: this CPU or its OS lacks '" + name + "' (" + kLevels[i].needs +
                                  "); available here: " + list(isas_available()));
    }
    return static_cast<Isa>(i);
  }
  std::string all;
  for (const Level& level : kLevels) all += (all.empty() ? "" : ", ") + std::string(level.name);
  throw std::invalid_argument("SPARSEPRUNE_ISA: must be one of " + all + ", got '" + name + "'");
}

const KernelTable& table_of(Isa isa) {
  static KernelTable tables[kIsas];
  static std::once_flag built[kIsas];
  const int level = static_cast<int>(isa);
  std::call_once(built[level], [level] {
    KernelTable table{};
    for (int i = 0; i <= level; ++i) {
      if (kLevels[i].install) kLevels[i].install(table);
    }
    tables[level] = table;
  });
  return tables[level];
}

std::atomic<const KernelTable*> g_table{nullptr};

}  // namespace

const char* isa_name(Isa isa) {
  return kLevels[static_cast<int>(isa)].name;
}

std::vector<std::string> isas_built() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) {
    if (level.install) names.emplace_back(level.name);
  }
  return names;
}

std::vector<std::string> isas_available() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(best()); ++i) {
    if (kLevels[i].install) names.emplace_back(kLevels[i].name);
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
