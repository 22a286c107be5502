#include "device.h"

#include <stdexcept>

#include "cuda/device.h"

namespace {
int multiprocessors = 8;
}

namespace sparseprune::simt {
void set_sm_count(int count) {
  if (count < 1) throw std::invalid_argument("sm_count: must be at least 1, got " + std::to_string(count));
  multiprocessors = count;
}
}  // namespace sparseprune::simt

namespace sparseprune::cuda {

DeviceGuard::DeviceGuard(int) : before_(-1) {
}
DeviceGuard::~DeviceGuard() = default;

int sm_count(int) {
  return multiprocessors;
}

void check(int error, const char* op) {
  if (error != 0) throw std::runtime_error(std::string(op) + ": error " + std::to_string(error));
}

std::string missing() {
  return "";
}

}  // namespace sparseprune::cuda
