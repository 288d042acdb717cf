// Starts the kernels of the on-chip tiers.

#ifndef TFOPS_BATCH_NORM_CUDA_ONCHIP_LAUNCH_H_
#define TFOPS_BATCH_NORM_CUDA_ONCHIP_LAUNCH_H_

#include <optional>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/launch.h"
#include "csrc/batch_norm/cuda/onchip.h"
#include "csrc/batch_norm/cuda/policy.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cuda {

inline LaunchShape ShapeOf(const OnChip& plan, int64_t virtual_batches) {
  const bool cooperative = plan.scope == Scope::kGrid && plan.group > 1;
  return {{static_cast<int>(plan.Blocks()), 1, static_cast<int>(virtual_batches)},
          {plan.threads},
          plan.scope == Scope::kCluster ? plan.group : 1,
          plan.shared_bytes,
          cooperative};
}

// The kernel for a data type.
const void* OnChipForwardKernelOf(DataType dtype);
const void* OnChipBackwardKernelOf(DataType dtype);

// The workspace has room for plan.ExchangedItems(). Of virtual batches, what they have in common goes to [V, C], to be
// merged.
cudaError_t OnChipForward(const OnChip& plan, const Problem& problem, const ForwardArrays& arrays, void* workspace,
                          TakenIn* taken, void* stream);
cudaError_t OnChipBackward(const OnChip& plan, const Problem& problem, const BackwardArrays& arrays, void* workspace,
                           SharedGradients* shared, void* stream);

// The status of a call, if a launch on the chip settles it: it was made, or went wrong so that nothing else can be
// done. None if it was refused: then nothing has run, and streaming has to do the work, now and for this problem from
// now on.
std::optional<Status> Settle(cudaError_t launched, const Problem& problem, Pass pass, bool aligned,
                             const Device& device, const Choice& choice, void* stream);

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_ONCHIP_LAUNCH_H_
