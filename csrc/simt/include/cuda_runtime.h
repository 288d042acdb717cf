// CUDA's words for a host compiler, as far as the kernels use them: nvcc's keywords and variables here, its device
// functions in device.h, the runtime's functions in runtime.h.

#ifndef TFOPS_SIMT_INCLUDE_CUDA_RUNTIME_H_
#define TFOPS_SIMT_INCLUDE_CUDA_RUNTIME_H_

#include <vector_types.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __restrict__ __restrict

#include "csrc/simt/device.h"
#include "csrc/simt/runtime.h"

#endif  // TFOPS_SIMT_INCLUDE_CUDA_RUNTIME_H_
