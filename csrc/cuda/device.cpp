// The card and the driver, by the CUDA runtime. It is linked in, and libcuda is looked for by the first call: the library
// loads where there is neither a card nor a driver.
#include "cuda/device.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <stdexcept>

namespace sparseprune::cuda {
namespace {

constexpr int kOldest = 80;  // compute capability x 10: the first with cp.async and mma.sp

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string describe(cudaError_t error) {
  std::string text = "CUDA error " + std::to_string(static_cast<int>(error)) + ", " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    text +=
        "; this build has no kernels for this card (sparseprune.cuda_info() says for which it has): build with "
        "-DCMAKE_CUDA_ARCHITECTURES=native";
  } else {
    text += "; run again with CUDA_LAUNCH_BLOCKING=1 to see which call it comes from";
  }
  return text;
}

}  // namespace

std::string missing() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // ours alone: the next launch must not report it
    int driver = 0;
    const bool known = cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0;
    if (error == cudaErrorInsufficientDriver && known) {
      return "the NVIDIA driver serves CUDA " + version(driver) + ", these kernels need " + version(CUDART_VERSION) +
             "; install a newer driver, or keep the model on the CPU";
    }
    if (error == cudaErrorInsufficientDriver) {
      return "no NVIDIA driver was found; install one (nvidia-smi shows it), or keep the model on the CPU";
    }
    if (error != cudaErrorNoDevice) return describe(error);
  }
  if (count == 0)
    return "the NVIDIA driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or keep the model on the CPU";
  return "";
}

void check(int error, const char* op) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();
  const std::string lacking = missing();
  throw std::runtime_error(std::string(op) + ": " + (lacking.empty() ? describe(static_cast<cudaError_t>(error)) : lacking));
}

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&before_), "CUDA");
  if (device == before_) {
    before_ = -1;  // nothing to put back
  } else {
    check(cudaSetDevice(device), "CUDA");
  }
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) (void)cudaSetDevice(before_);
}

int sm_count(int device) {
  static std::array<std::atomic<int>, 64> cached{};
  const bool fits = device >= 0 && device < static_cast<int>(cached.size());
  int count = fits ? cached[static_cast<std::size_t>(device)].load(std::memory_order_relaxed) : 0;
  if (count > 0) return count;
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "CUDA");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "CUDA");
  if (10 * major + minor < kOldest) {
    throw std::runtime_error("CUDA: the kernels need a GPU of compute capability 8.0 or later (Ampere), device " +
                             std::to_string(device) + " has " + std::to_string(major) + "." + std::to_string(minor) +
                             "; keep the model on the CPU");
  }
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "CUDA");
  if (fits) cached[static_cast<std::size_t>(device)].store(count, std::memory_order_relaxed);
  return count;
}

}  // namespace sparseprune::cuda
