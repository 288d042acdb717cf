// The one place where kernels are launched.

#ifndef TFOPS_BATCH_NORM_CUDA_LAUNCH_H_
#define TFOPS_BATCH_NORM_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <string>
#include <utility>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/extent.h"
#include "csrc/batch_norm/cuda/prepare.h"

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

// `attributes` lasts as long as what is returned.
inline cudaLaunchConfig_t ConfigOf(const LaunchShape& shape, void* stream, cudaLaunchAttribute (&attributes)[2]) {
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
  return config;
}

// Starts a kernel. It does not wait: an error of the kernel itself belongs to whoever synchronizes. What CUDA lets a
// kernel have only if asked, more than 48 KB of dynamic shared memory and clusters of more than 8 blocks,
// AskOccupancy() has asked for. In a Rehearsal the kernel is loaded, and not started.
template <typename... Parameters, typename... Arguments>
cudaError_t Start(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream, Arguments&&... arguments) {
  if (IsRehearsal()) {
    cudaFuncAttributes loaded;
    return cudaFuncGetAttributes(&loaded, reinterpret_cast<const void*>(kernel));
  }
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = ConfigOf(shape, stream, attributes);
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// Starts a kernel, and turns CUDA's error into a status.
template <typename... Parameters, typename... Arguments>
Status Launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream, Arguments&&... arguments) {
  return ToStatus(Start(kernel, shape, stream, std::forward<Arguments>(arguments)...), "starting a CUDA kernel");
}

template <typename... Parameters, typename... Arguments>
Status Launch(void (*kernel)(Parameters...), const Extent& grid, const Extent& block, void* stream,
              Arguments&&... arguments) {
  return Launch(kernel, LaunchShape{grid, block}, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_LAUNCH_H_
