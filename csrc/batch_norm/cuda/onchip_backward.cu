// The backward pass of the on-chip tiers: its kernels, and how they start.

#include "csrc/batch_norm/cuda/dispatch.h"
#include "csrc/batch_norm/cuda/launch.h"
#include "csrc/batch_norm/cuda/onchip_backward.cuh"
#include "csrc/batch_norm/cuda/onchip_launch.h"
#include "csrc/batch_norm/virtual_batches.h"

namespace tfops::cuda {

const void* OnChipBackwardKernelOf(DataType dtype) {
  return WithDataType(dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return reinterpret_cast<const void*>(&OnChipBackwardKernel<T, kVectorLanes<T>>);
  });
}

cudaError_t OnChipBackward(const OnChip& plan, const Problem& problem, const BackwardArrays& arrays, void* workspace,
                           SharedGradients* shared, void* stream) {
  return WithDataType(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return Start(OnChipBackwardKernel<T, kVectorLanes<T>>, ShapeOf(plan, problem.virtual_batches), stream, plan,
                 OfVirtualBatch(problem), ActivationIn<Arithmetic<T>>(problem), arrays, AffineOf(problem, arrays),
                 GradientOf(problem, arrays), ResidualGradient(problem, arrays), workspace, shared);
  });
}

}  // namespace tfops::cuda
