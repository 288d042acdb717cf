// What the kernels of the streaming tier share; how a tensor maps to their blocks is in streaming.h.

#ifndef TFOPS_BATCH_NORM_CUDA_STREAMING_CUH_
#define TFOPS_BATCH_NORM_CUDA_STREAMING_CUH_

#include "csrc/batch_norm/cuda/intrinsics.cuh"
#include "csrc/batch_norm/cuda/streaming.h"
#include "csrc/batch_norm/cuda/sums.cuh"
#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/batch_norm/cuda/walk.cuh"

namespace tfops::cuda {

__device__ __forceinline__ Place PlaceInBlock() {
  return {static_cast<int>(threadIdx.x), static_cast<int>(threadIdx.y), static_cast<int>(threadIdx.z)};
}

// The virtual batch that a block is for, in a phase of that direction.
template <Direction kDirection>
__device__ __forceinline__ int64_t VirtualBatch() {
  return kDirection == Direction::kForward ? blockIdx.z : gridDim.z - 1 - blockIdx.z;
}

// The thread's way through its block's split. The phases after the moments go backwards, blocks and steps, and so begin
// with what the moments left in the cache.
template <int kLanes, Direction kDirection>
__device__ __forceinline__ Walk<kLanes, kDirection> WalkSplit(const StreamingTiling& tiling) {
  constexpr bool kForward = kDirection == Direction::kForward;
  const int64_t slab = kForward ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  const int64_t split = kForward ? blockIdx.y : gridDim.y - 1 - blockIdx.y;
  const int64_t first = split * tiling.split_steps;
  const int64_t count = min(tiling.split_steps, tiling.steps - first);
  return {tiling, PlaceInBlock(), slab, first, count, VirtualBatch<kDirection>()};
}

// What a block of the streaming tier needs to sum up: a slab has no more units than the block may have threads.
template <typename F, int kLanes>
__device__ __forceinline__ SumsMemory<F> StreamingSumsMemory() {
  static_assert(StreamingTuning::kWidth * kLanes <= StreamingTuning::kThreads);
  struct Memory {
    F numbers[StreamingTuning::kThreads * kLanes];
    double parts[StreamingTuning::kThreads];
    double totals[4 * StreamingTuning::kThreads];
  };
  Memory& memory = BlockShared<Memory>();
  return {memory.numbers, memory.parts, memory.totals};
}

// Stores a block's result for a unit of its slab, in a phase that walks forward: partials[virtual batch][unit][split].
template <typename Partial>
__device__ __forceinline__ void StoreOfBlock(const StreamingTiling& tiling, int in_slab, const Partial& result,
                                             Partial* partials) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * tiling.sums.units + in_slab;
  const int64_t row = VirtualBatch<Direction::kForward>() * tiling.units + unit;
  if (unit < tiling.units) partials[row * gridDim.y + blockIdx.y] = result;
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_STREAMING_CUH_
