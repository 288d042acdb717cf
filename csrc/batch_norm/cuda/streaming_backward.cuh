// The backward phases of the streaming tier. How the tensor maps to threads: streaming.h.

#ifndef TFOPS_BATCH_NORM_CUDA_STREAMING_BACKWARD_CUH_
#define TFOPS_BATCH_NORM_CUDA_STREAMING_BACKWARD_CUH_

#include "csrc/batch_norm/cuda/accumulate.cuh"
#include "csrc/batch_norm/cuda/elementwise.cuh"
#include "csrc/batch_norm/cuda/streaming.cuh"
#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cuda {

struct GradientArrays {
  const void* dy = nullptr;
  const void* x = nullptr;
  const void* residual = nullptr;  // or null
  const uint8_t* mask = nullptr;   // or null
};

// What one step of the backward phases reads, and what it makes of that.
template <typename T, int kLanes>
class GradientStep {
 public:
  using F = Arithmetic<T>;

  template <bool kLast, typename Walk>
  __device__ __forceinline__ void Load(const GradientArrays& arrays, const Tiling& tiling, const Walk& walk) {
    inside_ = walk.Inside();
    if (!inside_) return;
    LoadVector<kLast>(&dy_, arrays.dy, walk.Offset());
    LoadVector<kLast>(&x_, arrays.x, walk.Offset());
    if (arrays.residual) LoadVector<kLast>(&residual_, arrays.residual, walk.Offset());
    if (arrays.mask) bits_ = arrays.mask[walk.MaskOffset(tiling)] >> walk.MaskBit();
  }

  __device__ __forceinline__ bool Inside() const { return inside_; }

  // dz = dy * act'(z) and xc = x - mean.
  __device__ __forceinline__ void Compute(const GradientArrays& arrays, Activation activation,
                                          const Affine<F, kLanes>& affine, F (&dz)[kLanes], F (&xc)[kLanes]) const {
    dy_.Unpack(dz);
    x_.Unpack(xc);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) xc[lane] -= affine.mean[lane];
    if (activation == Activation::kNone) return;
    if (arrays.mask) return MaskedGradientVector(activation, bits_, dz);
    F z[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) z[lane] = affine.Apply(xc[lane], lane);
    if (arrays.residual) {
      F added[kLanes];
      residual_.Unpack(added);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) z[lane] += added[lane];
    }
    ActivationGradientVector(activation, z, dz);
  }

 private:
  template <bool kLast>
  __device__ __forceinline__ static void LoadVector(Vector<T, kLanes>* vector, const void* array, int64_t offset) {
    if constexpr (kLast) {
      vector->LoadLast(array, offset);
    } else {
      vector->Load(array, offset);
    }
  }

  Vector<T, kLanes> dy_;
  Vector<T, kLanes> x_;
  Vector<T, kLanes> residual_;
  unsigned bits_;
  bool inside_;
};

template <typename T, int kLanes>
__global__ void __launch_bounds__(StreamingTuning::kThreads, StreamingTuning::kBlocks)
    GradientMomentsKernel(Tiling tiling, AffineArrays affine_arrays, GradientArrays arrays, Activation activation,
                          GradientSums* partials) {
  using F = Arithmetic<T>;
  constexpr int kBatch = StreamingBatch<kLanes>::kGradientMoments;
  GradientAccumulator<F, kLanes> accumulator;
  Walk<kLanes, Direction::kForward> walk(tiling);
  const Affine<F, kLanes> affine(affine_arrays, walk.ChannelToRead(tiling), tiling.planes ? 0 : 1);
  while (!walk.Done()) {
    GradientStep<T, kLanes> batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      batch[i].template Load<false>(arrays, tiling, walk);
      walk.Advance();
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!batch[i].Inside()) continue;
      F dz[kLanes], xc[kLanes];
      batch[i].Compute(arrays, activation, affine, dz, xc);
      accumulator.Add(dz, xc);
    }
    accumulator.CloseLongChain(kBatch);
  }
  accumulator.CloseChain();
  StoreBlock<kLanes>(accumulator, tiling, walk, partials);
}

// `dx` and `dresidual` may be dy's array, and `dresidual` null.
template <typename T, int kLanes>
__global__ void __launch_bounds__(StreamingTuning::kThreads, StreamingTuning::kBlocks)
    GradientNormalizeKernel(Tiling tiling, AffineArrays affine_arrays, GradientArrays arrays, Activation activation,
                            const GradientCoefficients<Arithmetic<T>>* coefficients, void* dx, void* dresidual) {
  using F = Arithmetic<T>;
  constexpr int kBatch = StreamingBatch<kLanes>::kGradientNormalize;
  Walk<kLanes, Direction::kBackward> walk(tiling);
  const int64_t channel = walk.ChannelToRead(tiling);
  const int lane_stride = tiling.planes ? 0 : 1;
  const Affine<F, kLanes> affine(affine_arrays, channel, lane_stride);
  F tilt[kLanes], shift[kLanes];
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    const GradientCoefficients<F> coefficient = coefficients[channel + lane * lane_stride];
    tilt[lane] = coefficient.tilt;
    shift[lane] = coefficient.shift;
  }
  while (!walk.Done()) {
    GradientStep<T, kLanes> batch[kBatch];
    auto ahead = walk;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      batch[i].template Load<true>(arrays, tiling, ahead);
      ahead.Advance();
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (batch[i].Inside()) {
        F dz[kLanes], xc[kLanes];
        batch[i].Compute(arrays, activation, affine, dz, xc);
        Vector<T, kLanes> result;
        if (dresidual) {
          result.Pack(dz);
          result.Store(dresidual, walk.Offset());
        }
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          xc[lane] = MultiplyAdd(dz[lane], affine.slope[lane], MultiplyAdd(xc[lane], tilt[lane], shift[lane]));
        }
        result.Pack(xc);
        result.Store(dx, walk.Offset());
      }
      walk.Advance();
    }
  }
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_STREAMING_BACKWARD_CUH_
