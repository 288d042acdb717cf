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

// Starts a kernel and checks that it could be started. It does not wait: an error of the kernel itself belongs to
// whoever synchronizes.
template <typename... Parameters, typename... Arguments>
Status Launch(void (*kernel)(Parameters...), const Extent& grid, const Extent& block, void* stream,
              Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(block.x, block.y, block.z);
  config.stream = static_cast<cudaStream_t>(stream);
  return ToStatus(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "starting a CUDA kernel");
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_LAUNCH_H_
