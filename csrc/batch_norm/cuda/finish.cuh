// The merge of the splits' partial results, in double and in a fixed order, and what follows from it for a channel.
//
// It is a kernel of its own, not the work of the last block to arrive at the end of the phase before: that needs
// counters that something has to zero, which is as good as a launch too, and one block for each slab of channels would
// merge alone what here takes a block for every eight.

#ifndef TFOPS_BATCH_NORM_CUDA_FINISH_CUH_
#define TFOPS_BATCH_NORM_CUDA_FINISH_CUH_

#include "csrc/batch_norm/cuda/accumulate.cuh"
#include "csrc/batch_norm/cuda/extent.h"
#include "csrc/batch_norm/cuda/streaming.h"
#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cuda {

// The partial results partials[split][unit], and which units are of a channel; see tiling.h.
struct PartialsShape {
  int64_t splits = 0;
  int64_t units = 0;
  int64_t channels = 0;
  int repeat = 1;
  int pixels = 1;
};

// The merge of all that is of channel c, for threads with y == 0. Threads (x, y): x over channels, y over what to
// merge. No splits: the partial result of nothing.
template <typename Partial>
__device__ __forceinline__ Partial MergeSplits(const Partial* partials, const PartialsShape& shape, int64_t c) {
  auto& shared = BlockShared<Partial[FinishTuning::kThreads * FinishTuning::kChannels]>();
  Partial total = {};
  if (c < shape.channels) {
    const int64_t per_split = int64_t{shape.repeat} * shape.pixels;
    for (int64_t i = threadIdx.y; i < shape.splits * per_split; i += FinishTuning::kThreads) {
      const int64_t split = per_split == 1 ? i : i / per_split;
      const int within = static_cast<int>(i - split * per_split);
      const int turn = per_split == 1 ? 0 : within / shape.pixels;
      const int64_t unit = (turn * shape.channels + c) * shape.pixels + (within - turn * shape.pixels);
      total.Merge(partials[split * shape.units + unit]);
    }
  }
  Partial* item = shared + threadIdx.y * FinishTuning::kChannels + threadIdx.x;
  *item = total;
  Fold(item, threadIdx.y, FinishTuning::kThreads, FinishTuning::kChannels);
  return *item;
}

template <typename F>
__global__ void __launch_bounds__(FinishTuning::kThreads* FinishTuning::kChannels)
    FinishMomentsKernel(Problem problem, ForwardArrays arrays, const PartialMoments<double>* partials,
                        PartialsShape shape) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * FinishTuning::kChannels + threadIdx.x;
  const PartialMoments<double> total = MergeSplits(partials, shape, c);
  if (threadIdx.y == 0 && c < problem.channels) {
    FinishStatistics<F>(problem, arrays, Moments<double>{total.count, total.mean, total.m2}, c);
  }
}

// Finishes the phase of moments by itself: writes count, mean and variance.
template <typename F>
__global__ void __launch_bounds__(FinishTuning::kThreads* FinishTuning::kChannels)
    FinishBatchMomentsKernel(MomentsArrays arrays, const PartialMoments<double>* partials, PartialsShape shape) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * FinishTuning::kChannels + threadIdx.x;
  const PartialMoments<double> total = MergeSplits(partials, shape, c);
  if (threadIdx.y > 0 || c >= shape.channels) return;
  static_cast<F*>(arrays.count)[c] = static_cast<F>(total.count);
  static_cast<F*>(arrays.mean)[c] = static_cast<F>(total.mean);
  static_cast<F*>(arrays.variance)[c] = static_cast<F>(total.count > 0 ? total.m2 / total.count : 0);
}

// Gathers the coefficients of dx as they were given.
template <typename F>
__global__ void __launch_bounds__(FinishTuning::kThreads* FinishTuning::kChannels)
    GatherCoefficientsKernel(StatisticsGradient statistics, int64_t channels, GradientCoefficients<F>* coefficients) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * FinishTuning::kChannels + threadIdx.x;
  if (threadIdx.y > 0 || c >= channels) return;
  coefficients[c] = {F(0), static_cast<const F*>(statistics.tilt)[c], static_cast<const F*>(statistics.shift)[c]};
}

// `coefficients` may be null: nothing needs them where there is no element.
template <typename F>
__global__ void __launch_bounds__(FinishTuning::kThreads* FinishTuning::kChannels)
    FinishGradientKernel(Problem problem, BackwardArrays arrays, const GradientSums* partials, PartialsShape shape,
                         GradientCoefficients<F>* coefficients) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * FinishTuning::kChannels + threadIdx.x;
  const GradientSums total = MergeSplits(partials, shape, c);
  if (threadIdx.y == 0 && c < problem.channels) {
    const GradientCoefficients<F> result = FinishGradient<F>(problem, arrays, total.dz, total.dz_xc, c);
    if (coefficients) coefficients[c] = result;
  }
}

inline PartialsShape ShapeOf(const StreamingTiling& tiling) {
  return {tiling.Splits(), tiling.units, tiling.channels, tiling.repeat, tiling.pixels};
}

inline constexpr Extent kFinishBlock = {FinishTuning::kChannels, FinishTuning::kThreads};

inline Extent FinishGrid(int64_t channels) {
  return {static_cast<int>((channels + FinishTuning::kChannels - 1) / FinishTuning::kChannels)};
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_FINISH_CUH_
