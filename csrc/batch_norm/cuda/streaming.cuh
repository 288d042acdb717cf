// What the kernels of the streaming tier share; how a tensor maps to their blocks is in streaming.h.

#ifndef TFOPS_BATCH_NORM_CUDA_STREAMING_CUH_
#define TFOPS_BATCH_NORM_CUDA_STREAMING_CUH_

#include "csrc/batch_norm/cuda/accumulate.cuh"
#include "csrc/batch_norm/cuda/intrinsics.cuh"
#include "csrc/batch_norm/cuda/streaming.h"
#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/batch_norm/cuda/walk.cuh"

namespace tfops::cuda {

// The thread's way through its block's split. The phases after the moments go backwards, blocks and steps, and so begin
// with what the moments left in the cache.
template <int kLanes, Direction kDirection>
__device__ __forceinline__ Walk<kLanes, kDirection> WalkSplit(const StreamingTiling& tiling) {
  constexpr bool kForward = kDirection == Direction::kForward;
  const int64_t slab = kForward ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  const int64_t split = kForward ? blockIdx.y : gridDim.y - 1 - blockIdx.y;
  const int64_t first = split * tiling.split_steps;
  const int64_t count = min(tiling.split_steps, tiling.steps - first);
  const Place place = {static_cast<int>(threadIdx.x), static_cast<int>(threadIdx.y), static_cast<int>(threadIdx.z)};
  return {tiling, place, slab, first, count};
}

// Whether the vector at an offset counts, which it does as a whole: MakeStreamingTiling has seen to that.
__device__ __forceinline__ bool IsCounted(const Mask& mask, int64_t offset) {
  return !mask.flags || LoadGlobal(mask.flags + offset / mask.length) != 0;
}

// Stores a block's merged totals as partials[split][unit], in a phase that walks forward.
template <int kLanes, typename Accumulator>
__device__ __forceinline__ void StoreBlock(const Accumulator& accumulator, const StreamingTiling& tiling, int64_t unit,
                                           decltype(typename Accumulator::Partial().InDouble())* stored) {
  auto& partials = BlockShared<typename Accumulator::Partial[kLanes][StreamingTuning::kThreads]>();
  MergeBlock<kLanes, StreamingTuning::kThreads>(accumulator, tiling.planes, partials);
  const bool first = threadIdx.z == 0 && (!tiling.planes || threadIdx.x == 0);
  if (!first || unit >= tiling.units) return;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int lane = 0; lane < (tiling.planes ? 1 : kLanes); ++lane) {
    stored[blockIdx.y * tiling.units + unit + lane] = partials[lane][thread].InDouble();
  }
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_STREAMING_CUH_
