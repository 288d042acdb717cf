// The forward pass of the on-chip tiers: its kernels, and how they start.

#include "csrc/batch_norm/cuda/dispatch.h"
#include "csrc/batch_norm/cuda/launch.h"
#include "csrc/batch_norm/cuda/onchip_forward.cuh"
#include "csrc/batch_norm/cuda/onchip_launch.h"
#include "csrc/batch_norm/virtual_batches.h"

namespace tfops::cuda {

const void* OnChipForwardKernelOf(DataType dtype) {
  return WithDataType(dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return reinterpret_cast<const void*>(&OnChipForwardKernel<T, kVectorLanes<T>>);
  });
}

cudaError_t OnChipForward(const OnChip& plan, const Problem& problem, const ForwardArrays& arrays, void* workspace,
                          TakenIn* taken, void* stream) {
  ForwardArrays used = arrays;
  if (!NeedsActivationBits(problem)) used.activation_bits = nullptr;
  return WithDataType(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return Start(OnChipForwardKernel<T, kVectorLanes<T>>, ShapeOf(plan, problem.virtual_batches), stream, plan,
                 OfVirtualBatch(problem), ActivationIn<Arithmetic<T>>(problem), used, workspace, taken);
  });
}

}  // namespace tfops::cuda
