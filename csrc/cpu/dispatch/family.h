// A family of instruction sets: levels of which each has all that the one before it has. Every family stands on `scalar`.
#pragma once

#include "cpu/kernels.h"

namespace sparseprune {

struct Level {
  const char* name;
  void (*install)(KernelTable&);  // null: not in this build
  bool (*is_here)();              // whether this CPU and its OS have what the level adds to the one before it
  const char* needs;
};

struct Family {
  const Level* levels;  // ascending
  int count;
};

// x86.cpp
extern const Family kX86;

}  // namespace sparseprune
