// What the kernels of the streaming tier share; how a tensor maps to their threads is in streaming.h.

#ifndef TFOPS_BATCH_NORM_CUDA_STREAMING_CUH_
#define TFOPS_BATCH_NORM_CUDA_STREAMING_CUH_

#include "csrc/batch_norm/cuda/accumulate.cuh"
#include "csrc/batch_norm/cuda/streaming.h"
#include "csrc/batch_norm/cuda/tuning.h"

namespace tfops::cuda {

enum class Direction { kForward, kBackward };

// A thread's way through its block's split of the tensor.
//
// All threads of a block take the same number of steps, so that they can meet on the way; where the block reaches past
// the tensor's edge, a thread's step may have no elements. Both directions visit the same vectors. The phases after the
// moments go backwards, blocks and steps, and so begin with what the moments left in the cache.
template <int kLanes, Direction kDirection>
class Walk {
 public:
  __device__ __forceinline__ explicit Walk(const Tiling& tiling)
      : steps_across_(tiling.steps_across), stride_across_(tiling.stride_across), stride_down_(tiling.stride_down) {
    constexpr bool kForward = kDirection == Direction::kForward;
    const int slab = kForward ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    split_ = kForward ? blockIdx.y : gridDim.y - 1 - blockIdx.y;
    const int64_t slab_column = tiling.planes ? 0 : static_cast<int64_t>(slab) * blockDim.x * kLanes;
    const int64_t column = slab_column + threadIdx.x * kLanes;
    channel_ = tiling.planes ? static_cast<int64_t>(slab) * blockDim.y + threadIdx.y : column;

    const int64_t first = split_ * tiling.split_steps;
    const int64_t last = min(first + tiling.split_steps, tiling.steps) - 1;
    left_ = static_cast<int>(last - first + 1);
    const int64_t start = kForward ? first : last;
    down_ = static_cast<int>(start / steps_across_);
    across_ = static_cast<int>(start - static_cast<int64_t>(down_) * steps_across_);

    // Of the steps across and down, those in which this thread is inside the tensor.
    const int64_t width = tiling.planes ? tiling.inner : tiling.channels;
    const bool real = channel_ < tiling.channels;
    end_across_ = column < width ? static_cast<int>((width - column - 1) / stride_across_ + 1) : 0;
    end_down_ =
        real && threadIdx.z < tiling.outer ? static_cast<int>((tiling.outer - threadIdx.z - 1) / blockDim.z + 1) : 0;

    const int64_t n = static_cast<int64_t>(down_) * blockDim.z + threadIdx.z;
    offset_ = n * tiling.channels * tiling.inner + (tiling.planes ? channel_ * tiling.inner : 0) + column +
              across_ * stride_across_;
  }

  // The channel of the thread's first lane. In rows, lane i is of channel Channel() + i.
  __device__ __forceinline__ int64_t Channel() const { return channel_; }
  // The same, or channel 0 for a thread past the last one: a channel whose parameters can be read.
  __device__ __forceinline__ int64_t ChannelToRead(const Tiling& tiling) const {
    return channel_ < tiling.channels ? channel_ : 0;
  }
  __device__ __forceinline__ int64_t Split() const { return split_; }

  __device__ __forceinline__ bool Done() const { return left_ <= 0; }
  __device__ __forceinline__ bool Inside() const { return left_ > 0 && across_ < end_across_ && down_ < end_down_; }
  // Of the vector's first element.
  __device__ __forceinline__ int64_t Offset() const { return offset_; }

  // Of the mask's byte with the vector's first element, and that element's bit in it.
  __device__ __forceinline__ int64_t MaskOffset(const Tiling& tiling) const {
    const int64_t n = static_cast<int64_t>(down_) * blockDim.z + threadIdx.z;
    const int64_t row = tiling.planes ? n * tiling.channels + channel_ : n;
    const int64_t column = tiling.planes ? across_ * stride_across_ + threadIdx.x * kLanes : channel_;
    return row * tiling.mask_row_bytes + column / 8;
  }
  __device__ __forceinline__ static int MaskBit() { return threadIdx.x * kLanes % 8; }

  __device__ __forceinline__ void Advance() {
    --left_;
    if (kDirection == Direction::kForward) {
      const bool wraps = ++across_ == steps_across_;
      offset_ += wraps ? stride_down_ : stride_across_;
      if (wraps) {
        across_ = 0;
        ++down_;
      }
    } else {
      const bool wraps = --across_ < 0;
      offset_ -= wraps ? stride_down_ : stride_across_;
      if (wraps) {
        across_ = steps_across_ - 1;
        --down_;
      }
    }
  }

 private:
  int64_t channel_;
  int64_t offset_;
  int split_;
  int left_;    // steps to go, this one included
  int across_;  // this step: the how manieth along a plane
  int down_;    // and the how manieth of these rows of steps
  int end_across_;
  int end_down_;
  int steps_across_;
  int64_t stride_across_;
  int64_t stride_down_;
};

// Stores a block's merged totals as partials[split][channel].
template <int kLanes, typename Accumulator, typename Walk>
__device__ __forceinline__ void StoreBlock(const Accumulator& accumulator, const Tiling& tiling, const Walk& walk,
                                           decltype(typename Accumulator::Partial().InDouble())* stored) {
  __shared__ typename Accumulator::Partial partials[kLanes][StreamingTuning::kThreads];
  MergeBlock<kLanes, StreamingTuning::kThreads>(accumulator, tiling.planes, partials);
  const bool first = threadIdx.z == 0 && (!tiling.planes || threadIdx.x == 0);
  if (!first || walk.Channel() >= tiling.channels) return;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int lane = 0; lane < (tiling.planes ? 1 : kLanes); ++lane) {
    stored[walk.Split() * tiling.channels + walk.Channel() + lane] = partials[lane][thread].InDouble();
  }
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_STREAMING_CUH_
