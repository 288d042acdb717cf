// Build(), Driver(), Describe(), and the checks that kernels can run here.

#include <cuda_runtime.h>

#include <string>
#include <thread>
#include <vector>

#include "csrc/batch_norm/cuda/launch.h"
#include "csrc/batch_norm/cuda/runtime.h"

#ifndef TFOPS_CUDA_ARCHITECTURES
#error "TFOPS_CUDA_ARCHITECTURES must be a string that lists the architectures compiled for"
#endif

namespace tfops::cuda {

// All code is compiled for the same architectures, so this stands for every kernel.
__global__ void AnyKernel() {}

namespace {

std::string VersionText(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// A runtime works with every driver of its own major version or a later one, and with no older one; so does machine
// code.
constexpr int kLeastDriver = CUDART_VERSION / 1000 * 1000;

// The driver's release that served it first, by the release notes of CUDA.
constexpr const char* kLeastRelease = kLeastDriver == 12000   ? " (release 525 or later)"
                                      : kLeastDriver == 13000 ? " (release 580 or later)"
                                                              : "";

Status Look(int number, Device* device) {
  int major = 0, minor = 0, shared_per_block = 0, l2 = 0, cooperative = 0, clusters = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } questions[] = {
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMultiProcessorCount, &device->multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_per_block},
      {cudaDevAttrL2CacheSize, &l2},
      {cudaDevAttrCooperativeLaunch, &cooperative},
      {cudaDevAttrClusterLaunch, &clusters},
  };
  for (const auto& question : questions) {
    const cudaError_t error = cudaDeviceGetAttribute(question.value, question.attribute, number);
    if (error != cudaSuccess) return ToStatus(error, "asking for a GPU's properties");
  }
  device->compute_capability = major * 10 + minor;
  device->shared_bytes_per_block = shared_per_block;
  device->l2_bytes = l2;
  device->cooperative = cooperative != 0;
  // The largest cluster that any chip of this compute capability has. AskOccupancy() is told whether this chip has it,
  // and how many at once.
  device->largest_cluster = clusters == 0 || device->compute_capability < 90 ? 1
                            : device->compute_capability < 120               ? 16
                                                                             : 8;
  device->number = number;
  return {};
}

Status LookAtAll(std::vector<Device>* devices) {
  int driver = 0;
  int gpus = 0;
  if (const Status status = Driver(&driver, &gpus); !status.ok()) return status;
  devices->resize(gpus);
  for (int number = 0; number < gpus; ++number) {
    if (const Status status = Look(number, &(*devices)[number]); !status.ok()) return status;
  }
  return {};
}

struct Machine {
  std::vector<Device> devices;
  Status status = LookAtAll(&devices);
};

const Machine& ThisMachine() {
  static const Machine machine;
  return machine;
}

}  // namespace

const std::vector<Device>& AllDevices() {
  static const std::vector<Device> h200 = {Device{}};
  const Machine& machine = ThisMachine();
  return machine.status.ok() ? machine.devices : h200;
}

Status CurrentDevice(Device* device) {
  const Machine& machine = ThisMachine();
  if (!machine.status.ok()) return machine.status;
  int number = 0;
  if (const cudaError_t error = cudaGetDevice(&number); error != cudaSuccess) {
    return ToStatus(error, "asking for the current GPU");
  }
  *device = machine.devices.at(number);
  return {};
}

BuildInfo Build() { return {true, VersionText(CUDART_VERSION), TFOPS_CUDA_ARCHITECTURES, VersionText(kLeastDriver)}; }

Status CheckDriver(int* version) {
  *version = 0;
  const cudaError_t error = cudaDriverGetVersion(version);
  if (error != cudaSuccess) return ToStatus(error, "asking for the CUDA driver's version");
  if (*version >= kLeastDriver) return {};
  const std::string need =
      "tfops' CUDA kernels need an NVIDIA driver for CUDA " + VersionText(kLeastDriver) + " or later" + kLeastRelease;
  if (*version == 0) return {StatusCode::kUnavailable, need + ", but there is none; install one, or run on the CPU"};
  return {StatusCode::kUnavailable,
          need + ", but the one installed is for CUDA " + VersionText(*version) + "; update it, or run on the CPU"};
}

Status Driver(int* version, int* gpus) {
  *gpus = 0;
  if (const Status status = CheckDriver(version); !status.ok()) return status;
  const cudaError_t error = cudaGetDeviceCount(gpus);
  if (error != cudaSuccess && error != cudaErrorNoDevice) return ToStatus(error, "counting the GPUs");
  cudaGetLastError();  // no device is no error
  if (*gpus > 0) return {};
  return {StatusCode::kUnavailable, "tfops' CUDA kernels found a driver for CUDA " + VersionText(*version) +
                                        ", but no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or run on the CPU"};
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

Status CheckGpu(int index) {
  Gpu gpu;
  if (const Status status = Describe(index, &gpu); !status.ok()) return status;
  cudaError_t error = cudaSuccess;
  // A thread of its own is asked, since the current GPU is a thread's.
  std::thread([&error, index] {
    error = cudaSetDevice(index);
    cudaFuncAttributes attributes;
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, AnyKernel);
  }).join();
  const bool no_code = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
                       error == cudaErrorUnsupportedPtxVersion;
  if (!no_code) return ToStatus(error, "asking whether a kernel can run on a GPU");
  return {StatusCode::kUnavailable,
          "this build of tfops has no CUDA kernels for GPU " + std::to_string(index) + " (" + gpu.name +
              ", compute capability " + std::to_string(gpu.compute_capability / 10) + "." +
              std::to_string(gpu.compute_capability % 10) + "), only for " + TFOPS_CUDA_ARCHITECTURES +
              "; build tfops with a CUDA toolkit that knows it, hide it by CUDA_VISIBLE_DEVICES, or run on the CPU"};
}

}  // namespace tfops::cuda
