// A thread's way through a range of a slab's steps. What steps and slabs are is in tiling.h.

#ifndef TFOPS_BATCH_NORM_CUDA_WALK_CUH_
#define TFOPS_BATCH_NORM_CUDA_WALK_CUH_

#include "csrc/batch_norm/cuda/intrinsics.cuh"
#include "csrc/batch_norm/cuda/tiling.h"

namespace tfops::cuda {

enum class Direction { kForward, kBackward };

// Of a block of any extent.
__device__ __forceinline__ int BlockThreads() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }
__device__ __forceinline__ int ThreadInBlock() {
  return static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
}

// Calls body(lane, channel) for the lanes of a vector of folded rows, which begins at that unit. Rows that were put
// together are short enough for 32 bits.
template <int kLanes, typename Body>
__device__ __forceinline__ void ForFoldedLanes(unsigned unit, unsigned pixels, unsigned channels, const Body& body) {
  unsigned pixel = unit % pixels;
  unsigned channel = unit / pixels % channels;
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    body(lane, channel);
    if (++pixel < pixels) continue;
    pixel = 0;
    if (++channel == channels) channel = 0;
  }
}

// A thread's place in its block, or past it: z >= block.z.
struct Place {
  int x;
  int y;
  int z;
};

// All threads of a block take the same number of steps, so that they can meet on the way; where the block reaches past
// the tensor's edge, a thread's step may have no elements. Both directions visit the same vectors.
template <int kLanes, Direction kDirection>
class Walk {
 public:
  // `count` steps of the slab, which begin with `first`, in that virtual batch.
  __device__ __forceinline__ Walk(const Tiling& tiling, const Place& place, int64_t slab, int64_t first, int64_t count,
                                  int64_t virtual_batch)
      : x_(place.x),
        z_(place.z),
        left_(static_cast<int>(count)),
        steps_across_(tiling.steps_across),
        stride_across_(tiling.stride_across),
        stride_down_(tiling.stride_down) {
    const int64_t column = (tiling.planes ? 0 : slab * stride_across_) + place.x * kLanes;
    unit_ = tiling.planes ? slab * tiling.block.y + place.y : column;

    const int64_t start = kDirection == Direction::kForward ? first : first + count - 1;
    down_ = static_cast<int>(start / steps_across_);
    across_ = static_cast<int>(start - static_cast<int64_t>(down_) * steps_across_);

    // This thread is inside the tensor in steps before end_across_ and end_down_.
    const int64_t width = tiling.planes ? tiling.inner : tiling.units;
    const bool real = unit_ < tiling.units && place.z < tiling.block.z && place.z < tiling.outer;
    end_across_ = column < width ? static_cast<int>((width - column - 1) / stride_across_ + 1) : 0;
    end_down_ = real ? static_cast<int>((tiling.outer - place.z - 1) / tiling.block.z + 1) : 0;

    const int64_t n = virtual_batch * tiling.outer + static_cast<int64_t>(down_) * tiling.block.z + place.z;
    offset_ = n * tiling.RowElements() + (tiling.planes ? unit_ * tiling.inner : 0) + column + across_ * stride_across_;
  }

  // The unit of the thread's first lane. In rows, lane i is of unit Unit() + i.
  __device__ __forceinline__ int64_t Unit() const { return unit_; }
  // Calls body(lane, channel) for each lane. A thread past the last channel gets channels whose parameters can be read.
  template <typename Body>
  __device__ __forceinline__ void ForLanes(const Tiling& tiling, const Body& body) const {
    const int64_t unit = unit_ < tiling.units ? unit_ : 0;
    if (tiling.Folded()) {
      ForFoldedLanes<kLanes>(static_cast<unsigned>(unit), static_cast<unsigned>(tiling.pixels),
                             static_cast<unsigned>(tiling.channels), body);
    } else {
      const int64_t stride = tiling.planes ? 0 : 1;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) body(lane, unit + lane * stride);
    }
  }

  __device__ __forceinline__ bool Done() const { return left_ <= 0; }
  __device__ __forceinline__ bool Inside() const { return left_ > 0 && across_ < end_across_ && down_ < end_down_; }
  // The offset of the vector's first element in the tensor.
  __device__ __forceinline__ int64_t Offset() const { return offset_; }
  // Calls body(offset) with that of the vector so many steps on, of those that there are, if this thread has one there
  // and no plane ends in between.
  template <typename Body>
  __device__ __forceinline__ void IfAhead(int steps, const Body& body) const {
    const int on = kDirection == Direction::kForward ? steps : -steps;
    if (steps_across_ == 1) {
      if (across_ < end_across_ && down_ + on < end_down_) body(offset_ + on * stride_down_);
    } else if (across_ + on >= 0 && across_ + on < end_across_ && down_ < end_down_) {
      body(offset_ + on * stride_across_);
    }
  }

  // Where the byte is that has the activation bit of the vector's first element, and which of its bits that is. The
  // virtual batch is that of the walk, which would cost it a register.
  __device__ __forceinline__ int64_t BitsOffset(const Tiling& tiling, int64_t virtual_batch) const {
    if constexpr (kLanes == 8) return offset_ / 8;  // rows are of whole bytes then, and have no padding
    const int64_t n = static_cast<int64_t>(down_) * tiling.block.z + z_;
    const int64_t row = tiling.planes ? n * tiling.units + unit_ : n;
    const int64_t column = tiling.planes ? across_ * stride_across_ + x_ * kLanes : unit_;
    return virtual_batch * tiling.bits_bytes + row * tiling.bits_row_bytes + column / 8;
  }
  __device__ __forceinline__ int BitInByte() const { return kLanes == 8 ? 0 : x_ * kLanes % 8; }

  // The vector's activation bits where their rows are not the view's: neighbours may be of different rows.
  __device__ __forceinline__ unsigned LoadFoldedBits(const Tiling& tiling, const uint8_t* activation_bits,
                                                     int64_t virtual_batch) const {
    const unsigned length = static_cast<unsigned>(tiling.bits_row_elements);
    const unsigned unit = static_cast<unsigned>(unit_);
    const int64_t n = static_cast<int64_t>(down_) * tiling.block.z + z_;
    unsigned row = unit / length;
    unsigned at = unit - row * length;
    const uint8_t* const rows = activation_bits + virtual_batch * tiling.bits_bytes +
                                n * (static_cast<unsigned>(tiling.units) / length) * tiling.bits_row_bytes;
    unsigned bits = 0;
#pragma unroll 1
    for (unsigned have = 0; have < kLanes;) {
      const unsigned taken = min(min(kLanes - have, 8 - at % 8), length - at);
      const unsigned byte = LoadGlobal(rows + row * tiling.bits_row_bytes + at / 8);
      bits |= (byte >> at % 8 & ((1u << taken) - 1)) << have;
      have += taken;
      at += taken;
      if (at == length) {
        at = 0;
        ++row;
      }
    }
    return bits;
  }

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
  int x_;
  int z_;
  int64_t unit_;
  int64_t offset_;
  int left_;    // steps to go, this one included
  int across_;  // this step's place along a plane
  int down_;    // its place in the order of such rows of steps
  int end_across_;
  int end_down_;
  int steps_across_;
  int64_t stride_across_;
  int64_t stride_down_;
};

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_WALK_CUH_
