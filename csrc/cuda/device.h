// The card and the driver: device.cpp asks CUDA, tests/simt/device.cpp answers for the emulator.
#pragma once

#include <string>

namespace sparseprune::cuda {

// Makes `device` the current one and puts back what was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);  // throws std::runtime_error, naming what is missing
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
};

int sm_count(int device);               // cached
void check(int error, const char* op);  // throws std::runtime_error for anything but 0: the op, CUDA's words, the remedy
// "" where kernels can run here, else what is missing and what to do about it.
std::string missing();

}  // namespace sparseprune::cuda
