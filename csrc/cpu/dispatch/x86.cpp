// The levels of x86-64, and what detects them: instructions that the CPU has and whose registers the OS saves.
#include "cpu/dispatch/family.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparseprune {
namespace {

#if defined(SPARSEPRUNE_X86)
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

bool has_avx2() {
  const Cpuid leaf1(1, 0);
  constexpr unsigned kOsxsave = 1u << 27, kAvx = 1u << 28, kFma = 1u << 12, kF16c = 1u << 29, kPopcnt = 1u << 23;
  if (!has(leaf1.c, kOsxsave | kAvx | kFma | kF16c | kPopcnt)) return false;
  constexpr unsigned kAvx2 = 1u << 5, kBmi = 1u << 3 | 1u << 8;
  return (read_xcr0() & 0x6) == 0x6 && has(Cpuid(7, 0).b, kAvx2 | kBmi);
}
bool has_avx512() {
  constexpr unsigned kAvx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;  // F, DQ, CD, BW, VL
  return (read_xcr0() & 0xe6) == 0xe6 && has(Cpuid(7, 0).b, kAvx512);
}
bool has_avx512_vbmi2() {
  constexpr unsigned kVbmi = 1u << 1, kVbmi2 = 1u << 6, kVnni = 1u << 11;
  return has(Cpuid(7, 0).c, kVbmi | kVbmi2 | kVnni);
}
bool has_avx512_bf16() {
  constexpr unsigned kBf16 = 1u << 5;
  return has(Cpuid(7, 1).a, kBf16);
}
bool has_amx() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  return (read_xcr0() & 0x60000) == 0x60000 && has(Cpuid(7, 0).d, kAmxBf16 | kAmxTile) && request_amx();
}

constexpr Level kLevels[] = {
    {"avx2", avx2::install, has_avx2, "AVX2, FMA, F16C, BMI1/2"},
    {"avx512", avx512::install, has_avx512, "AVX-512 F, BW, CD, DQ, VL"},
    {"avx512_vbmi2", avx512_vbmi2::install, has_avx512_vbmi2, "AVX-512 VBMI, VBMI2, VNNI"},
    {"avx512_bf16", avx512_bf16::install, has_avx512_bf16, "AVX-512 BF16"},
    {"amx", amx::install, has_amx, "AMX-TILE, AMX-BF16"},
};
#else
bool never() {
  return false;
}

constexpr Level kLevels[] = {
    {"avx2", nullptr, never, "x86-64"},         {"avx512", nullptr, never, "x86-64"},
    {"avx512_vbmi2", nullptr, never, "x86-64"}, {"avx512_bf16", nullptr, never, "x86-64"},
    {"amx", nullptr, never, "x86-64"},
};
#endif

}  // namespace

const Family kX86{kLevels, static_cast<int>(sizeof kLevels / sizeof kLevels[0])};

}  // namespace sparseprune
