// What the kernels of the on-chip tiers share: sums over a block, the exchange within a group. The plan is onchip.h's.

#ifndef TFOPS_BATCH_NORM_CUDA_ONCHIP_CUH_
#define TFOPS_BATCH_NORM_CUDA_ONCHIP_CUH_

#include "csrc/batch_norm/cuda/accumulate.cuh"
#include "csrc/batch_norm/cuda/intrinsics.cuh"
#include "csrc/batch_norm/cuda/onchip.h"
#include "csrc/batch_norm/cuda/types.cuh"
#include "csrc/batch_norm/cuda/walk.cuh"

namespace tfops::cuda {

// The place of the calling thread in its block, and of the block in the grid.
struct Share {
  int slab;
  int rank;  // of the block in its group
  int64_t first_channel;
  int channels;  // of the slab; fewer than slab_channels where the tensor ends
  Place place;

  __device__ __forceinline__ explicit Share(const OnChip& plan) {
    slab = static_cast<int>(blockIdx.x) / plan.group;
    rank = static_cast<int>(blockIdx.x) - slab * plan.group;
    first_channel = static_cast<int64_t>(slab) * plan.slab_channels;
    channels = static_cast<int>(min(static_cast<int64_t>(plan.slab_channels), plan.channels - first_channel));
    const int row = static_cast<int>(threadIdx.x) / plan.block.x;
    place.x = static_cast<int>(threadIdx.x) - row * plan.block.x;
    place.z = row / plan.block.y;
    place.y = row - place.z * plan.block.y;
  }

  template <int kLanes>
  __device__ __forceinline__ Walk<kLanes, Direction::kForward> WalkShare(const OnChip& plan) const {
    const int64_t first = plan.FirstStep(rank);
    return {plan, place, slab, first, plan.FirstStep(rank + 1) - first};
  }

  // A channel's elements in this block.
  __device__ __forceinline__ int64_t Count(const OnChip& plan) const {
    return plan.ElementsBefore(plan.FirstStep(rank + 1)) - plan.ElementsBefore(plan.FirstStep(rank));
  }

  // A lane's channel, as counted from the slab's first.
  template <int kLanes>
  __device__ __forceinline__ int Channel(const OnChip& plan, int lane) const {
    if (plan.planes) return place.y;
    const int slot = place.x * kLanes + lane;
    return plan.Folded() ? slot / plan.pixels % plan.slab_channels : slot;
  }
};

template <typename T>
__device__ __forceinline__ T* SharedAt(int offset) {
  return reinterpret_cast<T*>(DynamicShared() + offset);
}

// What a thread keeps from one phase to the next.
template <typename T, int kLanes>
struct Held {
  using Word = typename Vector<T, kLanes>::Word;

  __device__ __forceinline__ static Word& At(const OnChip& plan, int array, int step) {
    return SharedAt<Word>(plan.held_at)[(array * plan.held_steps + step) * static_cast<int>(blockDim.x) + threadIdx.x];
  }
  __device__ __forceinline__ static uint8_t& Bits(const OnChip& plan, int step) {
    return SharedAt<uint8_t>(plan.bits_at)[step * static_cast<int>(blockDim.x) + threadIdx.x];
  }
};

// Writes the activation bits of the block's share from what Held::Bits() has, where their rows are not the view's. A
// slab has whole rows of them.
template <int kLanes>
__device__ __forceinline__ void WriteFoldedBits(const OnChip& plan, const Share& share, uint8_t* activation_bits) {
  const uint8_t* const held = SharedAt<uint8_t>(plan.bits_at);
  const int length = static_cast<int>(plan.bits_row_elements);
  const int row_bytes = static_cast<int>(plan.bits_row_bytes);
  const int64_t first_unit = static_cast<int64_t>(share.slab) * plan.slots;
  const int bits_rows = static_cast<int>(min(static_cast<int64_t>(plan.slots), plan.units - first_unit)) / length;
  const int64_t first_row = plan.FirstStep(share.rank) * plan.block.z;
  const int64_t end_row = min(plan.FirstStep(share.rank + 1) * plan.block.z, plan.outer);
  const int count = static_cast<int>(end_row - first_row) * bits_rows * row_bytes;
  for (int i = threadIdx.x; i < count; i += static_cast<int>(blockDim.x)) {
    const int in_bits = i / row_bytes;
    const int at = (i - in_bits * row_bytes) * 8;
    const int row = in_bits / bits_rows;
    const int run = in_bits - row * bits_rows;
    const int step = row / plan.block.z;
    const int column = run * length + at;
    const int wanted = min(8, length - at);
    const uint8_t* vector =
        held + step * static_cast<int>(blockDim.x) + (row - step * plan.block.z) * plan.block.x + column / kLanes;
    unsigned byte = *vector >> column % kLanes;
    for (int have = kLanes - column % kLanes; have < wanted; have += kLanes) {
      byte |= static_cast<unsigned>(*++vector) << have;
    }
    byte &= (1u << wanted) - 1;
    const int64_t rows_before = ((first_row + row) * plan.units + first_unit) / length + run;
    StoreGlobal(activation_bits + rows_before * row_bytes + at / 8, static_cast<uint8_t>(byte));
  }
}

// totals[c] = the sum of values[lane] over all threads and lanes of the slab's channel c. In double after the first
// additions, and in an order that follows from the plan. All threads of the block take part, and see the totals.
template <typename F, int kLanes>
__device__ __forceinline__ void SumOverBlock(const OnChip& plan, const Share& share, const F (&values)[kLanes],
                                             double* totals) {
  F* const scratch = SharedAt<F>(plan.scratch_at);
  double* const parts = SharedAt<double>(plan.parts_at);
  const int threads = static_cast<int>(blockDim.x);
  const Place place = share.place;
  if (place.z < plan.block.z) {
    if (plan.planes) {
      F sum = 0;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) sum += values[lane];
      scratch[(place.z * plan.block.x + place.x) * plan.slots + place.y] = sum;
    } else {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        scratch[place.z * plan.slots + place.x * kLanes + lane] = values[lane];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < plan.slots * plan.parts; i += threads) {
    const int part = i / plan.slots;
    const int slot = i - part * plan.slots;
    double sum = 0;
#pragma unroll 4
    for (int entry = part; entry < plan.entries; entry += plan.parts) {
      sum += static_cast<double>(scratch[entry * plan.slots + slot]);
    }
    parts[i] = sum;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < plan.slab_channels; c += threads) {
    double sum = 0;
    for (int part = 0; part < plan.parts; ++part) {
      for (int turn = 0; turn < plan.repeat; ++turn) {
        const double* const of_channel = parts + part * plan.slots + (turn * plan.slab_channels + c) * plan.pixels;
#pragma unroll 4
        for (int pixel = 0; pixel < plan.pixels; ++pixel) sum += of_channel[pixel];
      }
    }
    totals[c] = sum;
  }
  __syncthreads();
}

// Collects own[slab_channels] of all blocks of the group. The result is theirs[rank][slab_channels]. `device` is for
// the grid, [block][slab_channels]. All threads of the group take part.
template <typename Partial>
__device__ __forceinline__ const Partial* Collect(const OnChip& plan, const Share& share, Partial* own,
                                                  Partial* device) {
  if (plan.group == 1) {
    __syncthreads();
    return own;
  }
  const int threads = static_cast<int>(blockDim.x);
  const int items = plan.slab_channels;
  Partial* const theirs = SharedAt<Partial>(plan.scratch_at);
  if (plan.scope == Scope::kCluster) {
    ClusterBarrier();
    for (int i = threadIdx.x; i < plan.group * items; i += threads) {
      const int rank = i / items;
      theirs[i] = *RemoteShared(own + (i - rank * items), rank);
    }
  } else {
    Partial* const slab = device + static_cast<int64_t>(share.slab) * plan.group * items;
    __syncthreads();
    for (int i = threadIdx.x; i < items; i += threads) slab[share.rank * items + i] = own[i];
    GridBarrier();
    for (int i = threadIdx.x; i < plan.group * items; i += threads) theirs[i] = slab[i];
  }
  __syncthreads();
  return theirs;
}

// Blocks of a cluster read one another's shared memory in Collect(), and so may not end before all have.
__device__ __forceinline__ void LeaveTogether(const OnChip& plan) {
  if (plan.scope == Scope::kCluster && plan.group > 1) ClusterBarrier();
}

// The moments of all of `count` sets. Two passes over them take fewer divisions than Chan's rule set by set: one.
__device__ __forceinline__ Moments<double> MergeAll(const PartialMoments<double>* sets, int count, int stride) {
  if (count == 1) return {sets->count, sets->mean, sets->m2};
  double n = 0, sum = 0, m2 = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    n += sets[i * stride].count;
    sum += sets[i * stride].count * sets[i * stride].mean;
  }
  const double mean = sum / n;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const double delta = sets[i * stride].mean - mean;
    m2 += sets[i * stride].m2 + delta * delta * sets[i * stride].count;
  }
  return {n, mean, m2};
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_ONCHIP_CUH_
