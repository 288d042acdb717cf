// What the kernels of the on-chip tiers share: a block's share, what it keeps, how a group meets. The plan is
// onchip.h's.

#ifndef TFOPS_BATCH_NORM_CUDA_ONCHIP_CUH_
#define TFOPS_BATCH_NORM_CUDA_ONCHIP_CUH_

#include "csrc/batch_norm/cuda/intrinsics.cuh"
#include "csrc/batch_norm/cuda/onchip.h"
#include "csrc/batch_norm/cuda/sums.cuh"
#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/batch_norm/cuda/types.cuh"
#include "csrc/batch_norm/cuda/walk.cuh"

namespace tfops::cuda {

template <typename T>
__device__ __forceinline__ T* SharedAt(int offset) {
  return reinterpret_cast<T*>(DynamicShared() + offset);
}

// The place of the calling thread in its block, of the block in the grid, and what is where of the block's steps.
struct Share {
  int slab;
  int rank;  // of the block in its group
  int64_t first_channel;
  int channels;  // of the slab; fewer than SlabChannels() where the tensor ends
  Place place;
  int64_t first_step;  // of the slab
  int steps;
  int in_registers;  // the first ones
  int in_shared;     // the next

  __device__ __forceinline__ explicit Share(const OnChip& plan) {
    slab = static_cast<int>(blockIdx.x) / plan.group;
    rank = static_cast<int>(blockIdx.x) - slab * plan.group;
    const int slab_channels = plan.sums.results;
    first_channel = static_cast<int64_t>(slab) * slab_channels;
    channels = static_cast<int>(min(static_cast<int64_t>(slab_channels), plan.channels - first_channel));
    const int row = static_cast<int>(threadIdx.x) / plan.block.x;
    place.x = static_cast<int>(threadIdx.x) - row * plan.block.x;
    place.z = row / plan.block.y;
    place.y = row - place.z * plan.block.y;
    first_step = plan.FirstStep(rank);
    steps = static_cast<int>(plan.FirstStep(rank + 1) - first_step);
    in_registers = min(plan.register_steps, steps);
    in_shared = min(plan.shared_steps, steps - in_registers);
  }

  __device__ __forceinline__ int Kept() const { return in_registers + in_shared; }

  // Through `count` steps of the share, from `first` on.
  template <int kLanes, Direction kDirection = Direction::kForward>
  __device__ __forceinline__ Walk<kLanes, kDirection> Through(const OnChip& plan, int first, int count) const {
    return {plan, place, slab, first_step + first, count, blockIdx.z};
  }
};

// What a thread keeps in shared memory from one phase to the next; steps are the share's.
template <typename T, int kLanes>
struct Held {
  using Word = typename Vector<T, kLanes>::Word;

  const OnChip& plan;
  const Share& share;

  __device__ __forceinline__ Word& At(int array, int step) const {
    const int row = array * plan.shared_steps + step - share.in_registers;
    return SharedAt<Word>(plan.kept_at)[row * static_cast<int>(blockDim.x) + threadIdx.x];
  }
  __device__ __forceinline__ Word& Residual(int step) const {
    return SharedAt<Word>(plan.residual_at)[step * static_cast<int>(blockDim.x) + threadIdx.x];
  }
  __device__ __forceinline__ uint8_t& Bits(int step) const {
    return SharedAt<uint8_t>(plan.bits_at)[step * static_cast<int>(blockDim.x) + threadIdx.x];
  }

  // Asks for all that shared memory is to keep: calls ask(step, offset) for its vectors, in OnChipTuning::kCopyGroups
  // groups.
  template <typename Ask>
  __device__ __forceinline__ void AskForAll(const Ask& ask) const {
    auto walk = share.template Through<kLanes>(plan, share.in_registers, share.in_shared);
    int step = 0;
    for (int group = 0; group < OnChipTuning::kCopyGroups; ++group) {
      for (; step < End(group); ++step, walk.Advance()) {
        if (walk.Inside()) ask(share.in_registers + step, walk.Offset());
      }
      CommitCopies();
    }
  }

  // Calls use(step) for these vectors, as they arrive, and accumulator->CloseChain() after each group; kLater
  // groups were asked for after them.
  template <int kLater, typename Accumulator, typename Use>
  __device__ __forceinline__ void UseAll(Accumulator* accumulator, const Use& use) const {
    auto walk = share.template Through<kLanes>(plan, share.in_registers, share.in_shared);
    int step = 0;
#pragma unroll 1
    for (int group = 0; group < OnChipTuning::kCopyGroups; ++group) {
      WaitUntil<OnChipTuning::kCopyGroups - 1, kLater>(group);
#pragma unroll 1
      for (; step < End(group); ++step, walk.Advance()) {
        if (walk.Inside()) use(share.in_registers + step);
      }
      accumulator->CloseChain();
    }
  }

  // Waits for a group, where nothing was asked for after the last of them. Returns the step after its last one.
  __device__ __forceinline__ int Await(int group) const {
    WaitUntil<OnChipTuning::kCopyGroups - 1, 0>(group);
    return share.in_registers + End(group);
  }

 private:
  __device__ __forceinline__ int End(int group) const {
    return share.in_shared * (group + 1) / OnChipTuning::kCopyGroups;
  }

  // Until that group is here, of which kLast is the last one.
  template <int kLast, int kLater>
  __device__ __forceinline__ static void WaitUntil(int group) {
    if (group == kLast) return WaitForCopies<OnChipTuning::kCopyGroups - 1 - kLast + kLater>();
    if constexpr (kLast > 0) WaitUntil<kLast - 1, kLater>(group);
  }
};

// The i-th of what is in registers, where i is not a constant, but the same for all threads: by branches, for what has
// an address leaves registers, and to look at each of so many would take longer than to use one.
template <int kBegin, int kEnd, typename V, int kCount>
__device__ __forceinline__ void PickFrom(const V (&kept)[kCount], int i, V* picked) {
  if constexpr (kEnd - kBegin == 1) {
    CopyInRegisters(kept[kBegin].word, &picked->word);
  } else {
    constexpr int kMiddle = (kBegin + kEnd) / 2;
    if (i < kMiddle) {
      PickFrom<kBegin, kMiddle>(kept, i, picked);
    } else {
      PickFrom<kMiddle, kEnd>(kept, i, picked);
    }
  }
}

template <typename V, int kCount>
__device__ __forceinline__ V Pick(const V (&kept)[kCount], int i) {
  V picked;
  PickFrom<0, kCount>(kept, i, &picked);
  return picked;
}

template <typename F>
__device__ __forceinline__ SumsMemory<F> OnChipSumsMemory(const OnChip& plan) {
  return {SharedAt<F>(plan.numbers_at), SharedAt<double>(plan.parts_at), SharedAt<double>(plan.totals_at)};
}

// Writes the activation bits of the block's share from what Held::Bits() has, where their rows are not the view's. A
// slab has whole rows of them.
template <int kLanes>
__device__ __forceinline__ void WriteFoldedBits(const OnChip& plan, const Share& share, uint8_t* activation_bits) {
  const uint8_t* const held = SharedAt<uint8_t>(plan.bits_at);
  const int length = static_cast<int>(plan.bits_row_elements);
  const int row_bytes = static_cast<int>(plan.bits_row_bytes);
  const int64_t first_unit = static_cast<int64_t>(share.slab) * plan.sums.units;
  const int bits_rows = static_cast<int>(min(static_cast<int64_t>(plan.sums.units), plan.units - first_unit)) / length;
  const int64_t rows_of_others = static_cast<int64_t>(blockIdx.z) * plan.outer;  // of the virtual batches before
  const int64_t first_row = share.first_step * plan.block.z;
  const int64_t end_row = min((share.first_step + share.steps) * plan.block.z, plan.outer);
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
    const int64_t rows_before = ((rows_of_others + first_row + row) * plan.units + first_unit) / length + run;
    StoreGlobal(activation_bits + rows_before * row_bytes + at / 8, static_cast<uint8_t>(byte));
  }
}

template <typename F>
struct Pair {
  F first;
  F second;
};

// Merges own[slab channels] of all blocks of the group, and puts what becomes of them, coefficients(c, merged), into
// channels[c] and channels[slab channels + c] of every block. Afterwards own[c] is merged, of the channels that the
// block has merged. `exchanged` is for the grid: partial results [slab][channel][rank], and coefficients behind them.
// All threads of the group take part.
template <typename F, typename Partial, typename Coefficients>
__device__ __forceinline__ void MeetGroup(const OnChip& plan, const Share& share, Partial* own, F* channels,
                                          void* exchanged, const Coefficients& coefficients) {
  const int threads = static_cast<int>(blockDim.x);
  const int slab_channels = plan.sums.results;
  const bool alone = plan.group == 1, cluster = plan.scope == Scope::kCluster;
  const int64_t slab = static_cast<int64_t>(share.slab) * slab_channels;
  Partial* const sets = static_cast<Partial*>(exchanged) + slab * plan.group;
  Pair<F>* const results =
      reinterpret_cast<Pair<F>*>(static_cast<Partial*>(exchanged) + plan.slabs * slab_channels * plan.group) + slab;
  const int begin = plan.FirstToMerge(share.rank), end = min(plan.FirstToMerge(share.rank + 1), share.channels);
  if (!alone) {
    __syncthreads();
    if (cluster) {
      ClusterBarrier();
    } else {
      for (int c = threadIdx.x; c < slab_channels; c += threads) sets[c * plan.group + share.rank] = own[c];
      GridBarrier();
    }
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int c = begin + static_cast<int>(threadIdx.x) / 32; c < end; c += threads / 32) {
      const Partial merged =
          SumByWarps<Partial>(plan.group, lane, 32, [&](int64_t rank) {
            return cluster ? *RemoteShared(own + c, static_cast<unsigned>(rank)) : sets[c * plan.group + rank];
          }).Result();
      if (lane == 0) own[c] = merged;
    }
  }
  __syncthreads();
  for (int c = begin + static_cast<int>(threadIdx.x); c < end; c += threads) {
    const Pair<F> result = coefficients(c, own[c]);
    if (!alone && !cluster) results[c] = result;
    for (int rank = 0; rank < (cluster ? plan.group : 1); ++rank) {
      F* const theirs = cluster ? RemoteShared(channels, static_cast<unsigned>(rank)) : channels;
      theirs[c] = result.first;
      theirs[slab_channels + c] = result.second;
    }
  }
  if (cluster) return ClusterBarrier();
  if (!alone) {
    GridBarrier();
    for (int c = threadIdx.x; c < share.channels; c += threads) {
      const Pair<F> result = results[c];
      channels[c] = result.first;
      channels[slab_channels + c] = result.second;
    }
  }
  __syncthreads();
}

// Calls write(c, merged) for the channels of the slab that this block has merged, by one thread each.
template <typename Partial, typename Write>
__device__ __forceinline__ void ForMerged(const OnChip& plan, const Share& share, const Partial* own,
                                          const Write& write) {
  const int end = min(plan.FirstToMerge(share.rank + 1), share.channels);
  for (int c = plan.FirstToMerge(share.rank) + static_cast<int>(threadIdx.x); c < end; c += blockDim.x) {
    write(c, own[c]);
  }
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_ONCHIP_CUH_
