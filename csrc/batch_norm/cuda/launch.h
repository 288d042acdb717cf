// The one place where kernels are launched.

#ifndef TFOPS_BATCH_NORM_CUDA_LAUNCH_H_
#define TFOPS_BATCH_NORM_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <string>
#include <utility>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/extent.h"

namespace tfops::cuda {

// Status of a CUDA call; `what` says for the message what it was for.
inline Status ToStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // the error is reported here, and not once more by whoever asks next
  // A build has kernels for some architectures only.
  const bool unavailable = error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion;
  return {unavailable ? StatusCode::kUnavailable : StatusCode::kInternal,
          std::string(what) + " failed: " + cudaGetErrorString(error)};
}

struct LaunchShape {
  Extent grid;
  Extent block;
  int cluster = 1;           // blocks beside each other, along grid.x, that form a cluster
  int dynamic_shared = 0;    // bytes
  bool cooperative = false;  // all blocks are resident at once, and may meet at a GridBarrier()
};

// What CUDA lets a kernel have only if asked: more than 48 KB of dynamic shared memory, clusters of more than 8 blocks.
// It asks once for each kernel, device and thread, for as much as the device has.
// It also loads the kernel.
Status AllowLargeLaunches(const void* kernel);

// Whether a Rehearsal lives on this thread.
bool IsRehearsal();

// Starts a kernel and checks that it could be started. It does not wait: an error of the kernel itself belongs to
// whoever synchronizes.
template <typename... Parameters, typename... Arguments>
Status Launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream, Arguments&&... arguments) {
  constexpr int kUsualShared = 48 << 10;
  constexpr int kPortableCluster = 8;
  const bool rehearsal = IsRehearsal();
  if (rehearsal || shape.dynamic_shared > kUsualShared || shape.cluster > kPortableCluster) {
    const Status allowed = AllowLargeLaunches(reinterpret_cast<const void*>(kernel));
    if (rehearsal || !allowed.ok()) return allowed;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.grid.x, shape.grid.y, shape.grid.z);
  config.blockDim = dim3(shape.block.x, shape.block.y, shape.block.z);
  config.dynamicSmemBytes = static_cast<size_t>(shape.dynamic_shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  if (shape.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  return ToStatus(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "starting a CUDA kernel");
}

template <typename... Parameters, typename... Arguments>
Status Launch(void (*kernel)(Parameters...), const Extent& grid, const Extent& block, void* stream,
              Arguments&&... arguments) {
  return Launch(kernel, LaunchShape{grid, block}, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_LAUNCH_H_
