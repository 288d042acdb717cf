// The backward pass of the on-chip tiers: its kernels, and how they start.

#include "csrc/batch_norm/cuda/dispatch.h"
#include "csrc/batch_norm/cuda/launch.h"
#include "csrc/batch_norm/cuda/onchip_backward.cuh"
#include "csrc/batch_norm/cuda/onchip_launch.h"

namespace tfops::cuda {

const void* OnChipBackwardKernelOf(DataType dtype, bool vectors) {
  return WithDataType(dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return WithLanes<T>(vectors, [&](auto lanes) {
      return reinterpret_cast<const void*>(&OnChipBackwardKernel<T, decltype(lanes)::value>);
    });
  });
}

cudaError_t OnChipBackward(const OnChip& plan, const Problem& problem, const BackwardArrays& arrays, void* workspace,
                           void* stream) {
  return WithDataType(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return WithLanes<T>(plan.lanes > 1, [&](auto lanes) {
      return Start(OnChipBackwardKernel<T, decltype(lanes)::value>, ShapeOf(plan), stream, plan, problem, arrays,
                   AffineOf(problem, arrays), GradientOf(problem, arrays), ResidualGradient(problem, arrays),
                   static_cast<GradientSums*>(workspace));
    });
  });
}

}  // namespace tfops::cuda
