// Starts the kernels of the on-chip tiers.

#ifndef TFOPS_BATCH_NORM_CUDA_ONCHIP_LAUNCH_H_
#define TFOPS_BATCH_NORM_CUDA_ONCHIP_LAUNCH_H_

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/launch.h"
#include "csrc/batch_norm/cuda/onchip.h"

namespace tfops::cuda {

inline LaunchShape ShapeOf(const OnChip& plan) {
  const bool cooperative = plan.scope == Scope::kGrid && plan.group > 1;
  return {{static_cast<int>(plan.Blocks())},
          {plan.threads},
          plan.scope == Scope::kCluster ? plan.group : 1,
          plan.shared_bytes,
          cooperative};
}

// The workspace has room for plan.ExchangedItems() partial results.
Status OnChipForward(const OnChip& plan, const Problem& problem, const ForwardArrays& arrays, void* workspace,
                     void* stream);
Status OnChipBackward(const OnChip& plan, const Problem& problem, const BackwardArrays& arrays, void* workspace,
                      void* stream);

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_ONCHIP_LAUNCH_H_
