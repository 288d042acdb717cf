// The backward phases of the streaming tier. How the tensor maps to threads: tiling.h.

#ifndef TFOPS_BATCH_NORM_CUDA_STREAMING_BACKWARD_CUH_
#define TFOPS_BATCH_NORM_CUDA_STREAMING_BACKWARD_CUH_

#include "csrc/batch_norm/cuda/elementwise.cuh"
#include "csrc/batch_norm/cuda/gradient.cuh"
#include "csrc/batch_norm/cuda/streaming.cuh"
#include "csrc/batch_norm/cuda/sums.cuh"
#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cuda {

template <typename T, int kLanes>
__global__ void __launch_bounds__(StreamingTuning::kThreads, StreamingTuning::kBlocks)
    GradientMomentsKernel(StreamingTiling tiling, AffineArrays affine_arrays, GradientArrays arrays,
                          ActivationIn<Arithmetic<T>> activation, GradientSums* partials) {
  using F = Arithmetic<T>;
  GradientAccumulator<F, kLanes> accumulator;
  auto walk = WalkSplit<kLanes, Direction::kForward>(tiling);
  const int64_t virtual_batch = VirtualBatch<Direction::kForward>();
  const Affine<F, kLanes> affine(affine_arrays, tiling, walk, virtual_batch);
  AddGradients<T, StreamingBatch<kLanes>::kGradientMoments>(arrays, tiling, activation, affine, virtual_batch, &walk,
                                                            &accumulator);
  accumulator.CloseChain();
  GradientsOverBlock(tiling, PlaceInBlock(), accumulator, StreamingSumsMemory<F, kLanes>(),
                     [&](int unit, const GradientSums& sums) { StoreOfBlock(tiling, unit, sums, partials); });
}

// `dx` and `dresidual` may be dy's array, and `dresidual` null.
template <typename T, int kLanes>
__global__ void __launch_bounds__(StreamingTuning::kThreads, StreamingTuning::kBlocks)
    GradientNormalizeKernel(StreamingTiling tiling, AffineArrays affine_arrays, GradientArrays arrays,
                            ActivationIn<Arithmetic<T>> activation,
                            const GradientCoefficients<Arithmetic<T>>* coefficients, bool centered, Mask mask, void* dx,
                            void* dresidual) {
  using F = Arithmetic<T>;
  constexpr int kBatch = StreamingBatch<kLanes>::kGradientNormalize;
  auto walk = WalkSplit<kLanes, Direction::kBackward>(tiling);
  const int64_t virtual_batch = VirtualBatch<Direction::kBackward>();
  const Affine<F, kLanes> affine(affine_arrays, tiling, walk, virtual_batch);
  F tilt[kLanes], shift[kLanes];
  const GradientCoefficients<F>* const own = coefficients + virtual_batch * tiling.channels;
  walk.ForLanes(tiling, [&](int lane, int64_t c) {
    tilt[lane] = own[c].tilt;
    shift[lane] = own[c].shift;
  });
  while (!walk.Done()) {
    GradientStep<T, kLanes> batch[kBatch];
    auto ahead = walk;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      batch[i].template Load<true>(arrays, tiling, ahead, virtual_batch);
      ahead.Advance();
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (batch[i].inside) {
        F dz[kLanes], xc[kLanes];
        batch[i].Compute(arrays, activation, affine, dz, xc);
        Vector<T, kLanes> result;
        if (dresidual) {
          result.Pack(dz);
          result.Store(dresidual, walk.Offset());
        }
        InputGradientVector(centered && IsCounted(mask, walk.Offset()), affine, tilt, shift, xc, dz);
        result.Pack(dz);
        result.Store(dx, walk.Offset());
      }
      walk.Advance();
    }
  }
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_STREAMING_BACKWARD_CUH_
