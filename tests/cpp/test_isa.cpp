// What is said of a level that this CPU (or its OS) lacks, and of one that this build lacks. See CMakeLists.txt for the
// two programs made of this file. Prints each message, and last "N passed, M failed".
#include <cstdio>
#include <stdexcept>
#include <string>

#include "cpu/dispatch/isa.h"

using namespace sparseprune;

#if defined(REFUSE_AMX)
#include <sys/syscall.h>

extern "C" long __wrap_syscall(long, ...) {
  return -1;  // the only system call made through syscall() asks for the tile registers
}
#endif

namespace {

int passed = 0, failed = 0;

void expect(bool ok, const std::string& what) {
  ++(ok ? passed : failed);
  if (!ok) std::printf("FAILED: %s\n", what.c_str());
}

void expect_refused(const std::string& level, const std::string& start) {
  const std::string before = kernels().isa;
  std::string message = "no error";
  try {
    set_isa(level);
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  std::printf("%s\n", message.c_str());
  expect(message.rfind("SPARSEPRUNE_ISA: " + start, 0) == 0, message + " does not start with " + start);
  expect(message.find(isas_available().back()) != std::string::npos, message + " does not say what there is");
  expect(kernels().isa == before, "the level in force stays");
}

}  // namespace

int main() {
  const std::string best = isas_available().back();
  expect(kernels().isa == best, "the best level serves");
#if defined(REFUSE_AMX)
  expect(best != "amx", "AMX is not available where the OS refuses it");
#if defined(SPARSEPRUNE_X86)
  expect(isas_built().back() == "amx", "AMX is built");
  expect_refused("amx", "this CPU or its OS lacks 'amx' (AMX-TILE, AMX-BF16)");
#endif
#else
  expect(best == "scalar" && isas_built().size() == 1, "this is a build of one level");
  for (const char* level : {"avx2", "avx512", "avx512_vbmi2", "avx512_bf16", "amx"}) {
    expect_refused(level, "this build has no kernels for '" + std::string(level) + "'");
  }
#endif
  expect_refused("sse2", "must be one of scalar, ");
  set_isa("scalar");
  expect(std::string(kernels().isa) == "scalar", "scalar is always there");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
