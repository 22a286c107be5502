// The emulator's own tests: each primitive against results made by hand from the PTX ISA, and each rule broken once.
#include "test_simt.h"

#include <cstdlib>

int main() {
  using namespace sparseprune::simt;
  // Nothing may depend on the order: many seeds, the first from the environment or by chance.
  const char* const rounds = std::getenv("SIMT_ROUNDS");
  for (int round = 0; round < (rounds ? std::atoi(rounds) : 4); ++round) {
    if (round > 0) set_seed(seed() * 6364136223846793005u + 1);
    std::printf("seed %llu\n", static_cast<unsigned long long>(seed()));
    test::test_pointers();
    test::test_places();
    test::test_numbers();
    test::test_shared();
    test::test_global();
    test::test_copies();
    test::test_warp();
    test::test_mma();
    test::test_machine();
    test::test_traffic();
    test::test_races();
  }
  std::printf("%d passed, %d failed\n", test::passed, test::failed);
  return test::failed != 0;
}
