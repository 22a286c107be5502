// Instruction-set levels: what this build has, what this CPU and OS have, which one serves.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace sparseprune {

// Slowest first: scalar, then this machine's family of instruction sets (family.h).
std::vector<std::string> isas_built();
std::vector<std::string> isas_available();  // built, and this CPU and OS have them

// The table in force: SPARSEPRUNE_ISA's level or the best available. Throws std::invalid_argument where the variable
// names no level, a level this build lacks, or one this CPU lacks: three different messages.
const KernelTable& kernels();
// Changes the level for the whole process (tests); packed weights made before stay valid only at levels with the same
// column order, which the linear checks.
void set_isa(const std::string& name);

}  // namespace sparseprune
