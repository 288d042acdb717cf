// What a launch may need beside the launch itself.

#include <set>
#include <utility>

#include "csrc/batch_norm/cuda/launch.h"

namespace tfops::cuda {
namespace {

thread_local int rehearsals = 0;

}  // namespace

Rehearsal::Rehearsal() { ++rehearsals; }
Rehearsal::~Rehearsal() { --rehearsals; }
bool IsRehearsal() { return rehearsals > 0; }

Status AllowLargeLaunches(const void* kernel) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return ToStatus(error, "asking for the current GPU");
  }
  // A thread's own, without a lock: to ask again does no harm, for it is always for the same.
  static thread_local std::set<std::pair<const void*, int>> allowed;
  if (allowed.count({kernel, device})) return {};

  int shared = 0;
  int major = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 shared - static_cast<int>(attributes.sharedSizeBytes));
  }
  if (error == cudaSuccess && major >= 9) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) return ToStatus(error, "preparing a CUDA kernel for a large launch");
  allowed.insert({kernel, device});
  return {};
}

}  // namespace tfops::cuda
