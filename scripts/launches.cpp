// What the launchers ask of CUDA: their code as nvcc compiled it, linked with a runtime that launches nothing and writes
// down what it was asked for. Prints a JSON object a launch: the call, the kernel's mangled name, grid, threads, shared
// bytes.
//
// scripts/cuda_evidence.py builds and runs it. No memory is touched, so the operands are addresses that nothing lies at.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "cuda/launchers.h"

namespace {

std::map<const void*, std::string>&
kernels() {  // host stub -> mangled name; filled before main by every object's registration
  static std::map<const void*, std::string> names;
  return names;
}
std::string call;  // what is being recorded, as the inside of a JSON object
int failures = 0;

void record(const void* stub, dim3 grid, dim3 block, std::size_t shared) {
  const auto found = kernels().find(stub);
  if (found == kernels().end()) {
    std::fprintf(stderr, "launch of a kernel that was never registered: %s\n", call.c_str());
    ++failures;
    return;
  }
  std::printf("{%s, \"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"threads\": %u, \"shared\": %zu}\n", call.c_str(),
              found->second.c_str(), grid.x, grid.y, grid.z, block.x * block.y * block.z, shared);
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {
}
void __cudaUnregisterFatBinary(void**) {
}
char __cudaInitModule(void**) {
  return 1;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {
}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[stub] = name;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void**) {
  record(stub, config->gridDim, config->blockDim, config->dynamicSmemBytes);
  return cudaSuccess;
}
// What a kernel's host stub would call. Launches by cudaLaunchKernelExC take the stub for a name and never call it.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, std::size_t*, void*) {
  std::abort();
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) {
  std::abort();
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, std::size_t, cudaStream_t) {
  std::abort();
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, std::size_t, cudaStream_t) {
  std::abort();
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

}  // extern "C"

namespace {

using namespace sparseprune;
using namespace sparseprune::cuda;

const char* const kDTypeNames[] = {"float32", "bfloat16", "float16"};

template <typename T>
T* somewhere(std::size_t offset = 0) {
  return reinterpret_cast<T*>((std::uintptr_t{1} << 40) + offset);
}

void begin(const char* op, DType dtype, std::int64_t rows, std::int64_t cols, const std::string& more = "") {
  call = "\"op\": \"" + std::string(op) + "\", \"dtype\": \"" + kDTypeNames[static_cast<int>(dtype)] +
         "\", \"rows\": " + std::to_string(rows) + ", \"cols\": " + std::to_string(cols) + more;
}

void end(int error) {
  if (error != 0) {
    std::fprintf(stderr, "error %d: %s\n", error, call.c_str());
    ++failures;
  }
}

// The element-wise operations. Offset 0: pointers aligned to 16 bytes, else to the element alone.
void conversions(DType dtype, std::int64_t rows, std::int64_t cols, std::size_t offset) {
  const Matrix m{rows, cols, dtype};
  const auto in = somewhere<const void>(offset);
  const auto out = somewhere<void>(offset);
  const auto bits = somewhere<std::uint8_t>();
  const auto counts = somewhere<std::int64_t>();
  const auto error = somewhere<std::int64_t>();
  begin("mask_bytes", dtype, rows, cols),
      end(mask_bytes(dtype, in, somewhere<std::uint8_t>(offset), out, rows * cols, nullptr));
  begin("mask_bits", dtype, rows, cols), end(mask_bits(m, in, bits, out, nullptr));
  begin("threshold", dtype, rows, cols), end(threshold(m, in, 0.5F, out, bits, nullptr));
  begin("bytes_to_bits", dtype, rows, cols), end(bytes_to_bits(rows, cols, somewhere<std::uint8_t>(offset), bits, nullptr));
  begin("bits_to_bytes", dtype, rows, cols), end(bits_to_bytes(rows, cols, bits, somewhere<std::uint8_t>(offset), nullptr));
  begin("scan_dense", dtype, rows, cols), end(scan_dense(m, in, bits, counts, nullptr));
  begin("scan_dense", dtype, rows, cols), end(scan_dense(m, in, nullptr, counts, nullptr));
  begin("count_bits", dtype, rows, cols), end(count_bits(rows, cols, bits, counts, error, nullptr));
  if (cols % 4 == 0) begin("fill_groups", dtype, rows, cols), end(fill_groups(rows, cols, 2, 4, bits, error, nullptr));
  begin("compress_dense", dtype, rows, cols), end(compress_dense(m, in, bits, counts, out, nullptr));
  begin("expand_dense", dtype, rows, cols), end(expand_dense(m, in, bits, counts, out, nullptr));
  begin("dense_to_csr", dtype, rows, cols), end(dense_to_csr(m, in, counts, somewhere<std::int32_t>(), out, nullptr));
  begin("csr_to_dense", dtype, rows, cols);
  end(csr_to_dense(m, counts, somewhere<std::int32_t>(), rows * cols / 2, in, out, error, nullptr));
  if (cols % 4 == 0 && size_of(dtype) == 2) {
    begin("sparse24_pack", dtype, rows, cols);
    end(sparse24_pack(m, in, nullptr, out, somewhere<std::uint32_t>(), error, nullptr));
    end(sparse24_pack(m, in, bits, out, somewhere<std::uint32_t>(), error, nullptr));
    begin("sparse24_unpack", dtype, rows, cols);
    end(sparse24_unpack(m, in, somewhere<std::uint32_t>(), out, nullptr, nullptr));
    end(sparse24_unpack(m, in, somewhere<std::uint32_t>(), nullptr, bits, nullptr));
    end(sparse24_unpack(m, in, somewhere<std::uint32_t>(), out, bits, nullptr));
  }
  const auto index = somewhere<std::uint64_t>();
  begin("bitmap8_index", dtype, rows, cols), end(bitmap8_index(rows, cols, bits, index, counts, nullptr));
  begin("bitmap8_pack", dtype, rows, cols), end(bitmap8_pack(m, in, index, counts, somewhere<void>(), nullptr));
  begin("bitmap8_unpack", dtype, rows, cols);
  end(bitmap8_unpack(m, index, counts, somewhere<void>(), rows * cols, out, nullptr, nullptr));
  end(bitmap8_unpack(m, index, counts, somewhere<void>(), rows * cols, nullptr, bits, nullptr));
  end(bitmap8_unpack(m, index, counts, somewhere<void>(), rows * cols, out, bits, nullptr));
}

const char* op_of(Layout layout) {
  if (is_of_codes(layout)) return "linear_fragments";
  return layout == Layout::sparse24 ? "linear_sparse24" : "linear_bitmap8";
}
// Of codes with what they are, which is part of the kernel: "2:4 int4 n8_m32_k8".
std::string config_of(const Packing& packing, int config) {
  const char* const values = packing.encoding == Encoding::int8           ? "int8 "
                             : packing.encoding == Encoding::int4         ? "int4 "
                             : packing.encoding == Encoding::int4_minimum ? "int4_minimum "
                                                                          : "";
  const char* const form = packing.layout == Layout::fragments24 ? "2:4 " : "";
  return form + std::string(values) + linear_config_name(packing, config);
}

void product(const Packing& packing, std::int64_t rows, std::int64_t cols, std::int64_t batch, const LinearPlan& plan,
             std::size_t offset, int multiprocessors) {
  const PackedHeader header = make_header(Home::cuda, rows, cols, packing, 0, round_up(rows * cols / 2, 32));
  begin(op_of(packing.layout), packing.dtype, rows, cols,
        ", \"batch\": " + std::to_string(batch) + ", \"config\": \"" + config_of(packing, plan.config) +
            "\", \"splits\": " + std::to_string(plan.splits) + ", \"multiprocessors\": " + std::to_string(multiprocessors));
  LinearCall c{};
  c.packing = packing, c.rows = rows, c.cols = cols, c.batch = batch;
  c.packed = somewhere<std::uint8_t>(), c.packed_bytes = geometry_of(header).total;
  c.x = somewhere<void>(offset), c.stride = cols, c.bias = somewhere<void>(), c.out = somewhere<void>();
  c.workspace = somewhere<void>(), c.plan = plan;
  end(linear(c));
}

void products(const Packing& packing) {
  const std::size_t item = size_of(packing.dtype);
  const std::int64_t odd_cols = is_two_four(packing.layout) ? 252 : 253;
  // Every kernel there is: each configuration, alone and in splits, with and without aligned activations.
  for (int config = 0; config < linear_configs(packing); ++config) {
    for (const int splits : {1, 4}) {
      const std::int64_t workspace = splits > 1 ? splits * 8 * 4096 * 4 : 0;
      product(packing, 4096, 4096, 8, {config, splits, workspace}, 0, 0);
      product(packing, 4096, 4096, 8, {config, splits, workspace}, item, 0);
      product(packing, 4095, odd_cols, 7, {config, splits, workspace}, 0, 0);
    }
  }
  // What is chosen for the layers of a 7B LLaMA, on an A100, an RTX 4090 and an H100.
  const std::int64_t shapes[][2] = {{4096, 4096}, {11008, 4096}, {4096, 11008}};
  for (const auto& shape : shapes) {
    for (const std::int64_t batch : {1, 4, 16, 64, 256, 1024, 4096}) {
      for (const int multiprocessors : {108, 128, 132}) {
        product(packing, shape[0], shape[1], batch, plan_linear(packing, shape[0], shape[1], batch, multiprocessors), 0,
                multiprocessors);
      }
    }
  }
}

void codes(const Packing& packing, std::int64_t rows, std::int64_t cols) {
  const auto units = somewhere<std::uint8_t>(), values = somewhere<std::uint8_t>();
  const auto scales = somewhere<std::uint16_t>();
  const auto mask = is_two_four(packing.layout) ? somewhere<std::uint8_t>() : nullptr;
  const auto minimums = has_minimums(packing.encoding) ? scales : nullptr;
  begin("fragments_pack", packing.dtype, rows, cols);
  end(fragments_pack(packing, rows, cols, values, mask, scales, minimums, units, nullptr));
  begin("fragments_unpack", packing.dtype, rows, cols);
  end(fragments_unpack(packing, rows, cols, units, values, mask, scales, minimums, nullptr));
  if (packing.layout == Layout::fragments) {
    begin("fragments_lookup", packing.dtype, rows, cols);
    end(fragments_lookup(packing, rows, cols, units, somewhere<std::int64_t>(), 512, somewhere<void>(), nullptr));
  }
  products(packing);
}

}  // namespace

int main() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    conversions(dtype, 4096, 4096, 0);
    conversions(dtype, 4095, 4092, size_of(dtype));
    conversions(dtype, 33, 61, size_of(dtype));
    products({Layout::bitmap8, dtype, Encoding::plain});
    if (dtype == DType::f32) continue;
    products({Layout::sparse24, dtype, Encoding::plain});
    for (const Encoding encoding : {Encoding::int8, Encoding::int4, Encoding::int4_minimum}) {
      codes({Layout::fragments, dtype, encoding, 64, DType::f16}, 4096, 4096);
      if (!has_minimums(encoding)) codes({Layout::fragments24, dtype, encoding, 64, DType::f16}, 4096, 4096);
    }
  }
  return failures == 0 ? 0 : 1;
}
