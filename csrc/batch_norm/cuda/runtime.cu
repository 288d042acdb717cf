// Build(), Driver(), Describe(), and the check that kernels can run here.

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "csrc/batch_norm/cuda/launch.h"
#include "csrc/batch_norm/cuda/runtime.h"

#ifndef TFOPS_CUDA_ARCHITECTURES
#error "TFOPS_CUDA_ARCHITECTURES must be a string that lists the architectures compiled for"
#endif

namespace tfops::cuda {
namespace {

std::string VersionText(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// A runtime works with every driver of its own major version or a later one, and with no older one.
constexpr int kLeastDriver = CUDART_VERSION / 1000 * 1000;

// Unavailable, and why, unless kernels can run.
Status Availability(int driver, int gpus) {
  const std::string need = "tfops' CUDA kernels need an NVIDIA driver for CUDA " + VersionText(kLeastDriver) +
                           " or later (release 580 or later has 13.0)";
  if (driver == 0) return {StatusCode::kUnavailable, need + ", but there is none; install one, or run on the CPU"};
  if (driver < kLeastDriver) {
    return {StatusCode::kUnavailable,
            need + ", but the one installed is for CUDA " + VersionText(driver) + "; update it, or run on the CPU"};
  }
  if (gpus == 0) {
    return {StatusCode::kUnavailable, "tfops' CUDA kernels found a driver for CUDA " + VersionText(driver) +
                                          ", but no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or run on the CPU"};
  }
  return {};
}

// The number of multiprocessors of each GPU.
Status CountMultiprocessors(std::vector<int>* counts) {
  int driver = 0;
  int gpus = 0;
  if (const Status status = Driver(&driver, &gpus); !status.ok()) return status;
  counts->resize(gpus);
  for (int device = 0; device < gpus; ++device) {
    const cudaError_t error = cudaDeviceGetAttribute(&(*counts)[device], cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return ToStatus(error, "asking for the number of multiprocessors");
  }
  return {};
}

}  // namespace

Status Multiprocessors(int* count) {
  struct Machine {
    std::vector<int> counts;
    Status status = CountMultiprocessors(&counts);
  };
  static const Machine machine;
  if (!machine.status.ok()) return machine.status;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return ToStatus(error, "asking for the current GPU");
  }
  *count = machine.counts.at(device);
  return {};
}

BuildInfo Build() { return {true, VersionText(CUDART_VERSION), TFOPS_CUDA_ARCHITECTURES}; }

Status Driver(int* version, int* gpus) {
  *version = *gpus = 0;
  const cudaError_t asked = cudaDriverGetVersion(version);
  if (asked != cudaSuccess) return ToStatus(asked, "asking for the CUDA driver's version");
  if (*version >= kLeastDriver) {
    const cudaError_t counted = cudaGetDeviceCount(gpus);
    if (counted != cudaSuccess && counted != cudaErrorNoDevice) return ToStatus(counted, "counting the GPUs");
    cudaGetLastError();  // no device is no error
  }
  return Availability(*version, *gpus);
}

Status Describe(int index, Gpu* gpu) {
  int driver = 0;
  int gpus = 0;
  if (const Status status = Driver(&driver, &gpus); !status.ok()) return status;
  cudaDeviceProp properties;
  const Status status = ToStatus(cudaGetDeviceProperties(&properties, index), "asking for a GPU's properties");
  if (!status.ok()) return status;
  gpu->name = properties.name;
  gpu->compute_capability = properties.major * 10 + properties.minor;
  gpu->multiprocessors = properties.multiProcessorCount;
  gpu->memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  return {};
}

}  // namespace tfops::cuda
