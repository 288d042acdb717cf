// The forward phases of the streaming tier. How the tensor maps to threads: tiling.h.

#ifndef TFOPS_BATCH_NORM_CUDA_STREAMING_FORWARD_CUH_
#define TFOPS_BATCH_NORM_CUDA_STREAMING_FORWARD_CUH_

#include "csrc/batch_norm/cuda/elementwise.cuh"
#include "csrc/batch_norm/cuda/streaming.cuh"
#include "csrc/batch_norm/cuda/sums.cuh"
#include "csrc/batch_norm/cuda/tuning.h"

namespace tfops::cuda {

template <typename T, int kLanes>
__global__ void __launch_bounds__(StreamingTuning::kThreads, StreamingTuning::kBlocks)
    MomentsKernel(StreamingTiling tiling, const void* x, Mask mask, Moments<double>* partials) {
  using F = Arithmetic<T>;
  MomentsAccumulator<F, kLanes> accumulator;
  auto walk = WalkSplit<kLanes, Direction::kForward>(tiling);
  AddMoments<T, StreamingBatch<kLanes>::kMoments>(&walk, x, mask, &accumulator);
  accumulator.CloseChain();
  const F most = static_cast<F>(tiling.split_steps * tiling.sums.numbers * (tiling.planes ? kLanes : 1));
  MomentsOverBlock(tiling, PlaceInBlock(), most, accumulator, StreamingSumsMemory<F, kLanes>(),
                   [&](int unit, const Moments<double>& moments) { StoreOfBlock(tiling, unit, moments, partials); });
}

struct NormalizeArrays {
  const void* x = nullptr;
  const void* residual = nullptr;  // or null
  void* y = nullptr;
  uint8_t* activation_bits = nullptr;  // or null
};

template <typename T, int kLanes>
__global__ void __launch_bounds__(StreamingTuning::kThreads, StreamingTuning::kBlocks)
    NormalizeKernel(StreamingTiling tiling, AffineArrays affine_arrays, NormalizeArrays arrays,
                    ActivationIn<Arithmetic<T>> activation) {
  using F = Arithmetic<T>;
  constexpr int kBatch = StreamingBatch<kLanes>::kNormalize;
  auto walk = WalkSplit<kLanes, Direction::kBackward>(tiling);
  const int64_t virtual_batch = VirtualBatch<Direction::kBackward>();
  const Affine<F, kLanes> affine(affine_arrays, tiling, walk, virtual_batch);
  while (!walk.Done()) {
    Vector<T, kLanes> x[kBatch];
    Vector<T, kLanes> residual[kBatch];
    auto ahead = walk;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (ahead.Inside()) {
        x[i].LoadLast(arrays.x, ahead.Offset());
        if (arrays.residual) residual[i].LoadLast(arrays.residual, ahead.Offset());
      }
      ahead.Advance();
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      unsigned bits = 0;
      if (walk.Inside()) {
        F z[kLanes];
        x[i].Unpack(z);
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) z[lane] = affine.Apply(z[lane] - affine.mean[lane], lane);
        if (arrays.residual) {
          F added[kLanes];
          residual[i].Unpack(added);
#pragma unroll
          for (int lane = 0; lane < kLanes; ++lane) z[lane] += added[lane];
        }
        bits = ActivateVector(activation, arrays.activation_bits != nullptr, z);
        Vector<T, kLanes> y;
        y.Pack(z);
        y.Store(arrays.y, walk.Offset());
      }
      if (arrays.activation_bits) {
        const unsigned byte = GatherByte<kLanes>(bits);
        if (walk.Inside() && walk.BitInByte() == 0) {
          StoreGlobal(arrays.activation_bits + walk.BitsOffset(tiling, virtual_batch), static_cast<uint8_t>(byte));
        }
      }
      walk.Advance();
    }
  }
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_STREAMING_FORWARD_CUH_
