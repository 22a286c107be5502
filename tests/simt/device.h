// What the emulator says of its card: csrc/cuda/device.h, answered by device.cpp.
#pragma once

namespace sparseprune::simt {

// How many multiprocessors plans are made for. Few, so that small tests walk many columns a block; at first 8.
void set_sm_count(int count);

}  // namespace sparseprune::simt
