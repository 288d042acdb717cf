// The streaming tier: each phase is a kernel that walks over the whole tensor. Host code without CUDA.
//
// A slab's steps are cut into `splits` equal ranges, one for each block. Blocks: grid.x over slabs, grid.y over splits,
// grid.z over virtual batches.

#ifndef TFOPS_BATCH_NORM_CUDA_STREAMING_H_
#define TFOPS_BATCH_NORM_CUDA_STREAMING_H_

#include <cstdint>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/extent.h"
#include "csrc/batch_norm/cuda/tiling.h"

namespace tfops::cuda {

struct StreamingTiling : Tiling {
  Extent grid;
  int64_t split_steps = 0;  // of each split but the last, which may have fewer

  int64_t Splits() const { return grid.y; }
};

// The tiling for a problem with at least one element. Its grid is that of a single virtual batch.
StreamingTiling MakeStreamingTiling(const Problem& problem, bool aligned, int multiprocessors);

// The tiling where only some elements count: vectors hold none that count beside others that do not.
StreamingTiling MakeStreamingTiling(const Problem& problem, const Mask& mask, bool aligned, int multiprocessors);

// The number of partial results, one for each split and unit of each virtual batch.
int64_t SplitItems(const Problem& problem, bool aligned, int multiprocessors);

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_STREAMING_H_
