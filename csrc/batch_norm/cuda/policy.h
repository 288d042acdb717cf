// Which tier a problem takes. Host code without CUDA.
//
// The on-chip tiers are alike but for the number of blocks that share a slab of channels, and how these meet. So the
// policy lists the plans that fit the GPU, reckons for each how long it will take, and takes the fastest; or streaming,
// if that is faster than all of them. Constants: PolicyTuning.

#ifndef TFOPS_BATCH_NORM_CUDA_POLICY_H_
#define TFOPS_BATCH_NORM_CUDA_POLICY_H_

#include <string>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/onchip.h"

namespace tfops::cuda {

enum class Tier { kOneBlock, kCluster, kGrid, kStreaming };
const char* NameOf(Tier tier);

struct Choice {
  Tier tier = Tier::kStreaming;
  bool forced = false;  // by TFOPS_TIER
  OnChip plan;          // of the on-chip tiers
  double nanoseconds = 0;
  // What else there was.
  Tier next = Tier::kStreaming;
  double next_nanoseconds = 0;
  bool any_fits = false;
};

// For a problem with at least one element. InvalidArgument if TFOPS_TIER names no tier, or one that cannot be had.
Status ChooseTier(const Problem& problem, Pass pass, bool aligned, const Device& device, Choice* choice);

// The same, remembered by the calling thread: there are a hundred plans to reckon with. `number` is the device's.
Status RecallTier(const Problem& problem, Pass pass, bool aligned, const Device& device, int number, Choice* choice);

// Why, in a sentence.
std::string Explain(const Problem& problem, Pass pass, const Choice& choice);

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_POLICY_H_
