// The merge of the splits' partial results, in double and in a fixed order, and what follows from it for a channel.
//
// A kernel of its own, not the work of the last block to arrive at the end of the phase before: that needs counters
// that something has to zero, which is as good as a launch too, and one block for each slab of channels would merge
// alone what here takes a block for every eight.

#ifndef TFOPS_BATCH_NORM_CUDA_FINISH_CUH_
#define TFOPS_BATCH_NORM_CUDA_FINISH_CUH_

#include "csrc/batch_norm/cuda/accumulate.cuh"
#include "csrc/batch_norm/cuda/extent.h"
#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cuda {

// The merge of partials[split][channel] over all splits, for threads with y == 0. Threads (x, y): x over channels, y
// over splits. No splits: the partial result of nothing.
template <typename Partial>
__device__ __forceinline__ Partial MergeSplits(const Partial* partials, int64_t splits, int64_t channels, int64_t c) {
  __shared__ Partial shared[FinishTuning::kThreads * FinishTuning::kChannels];
  Partial total = {};
  if (c < channels) {
    for (int64_t split = threadIdx.y; split < splits; split += FinishTuning::kThreads) {
      total.Merge(partials[split * channels + c]);
    }
  }
  Partial* item = shared + threadIdx.y * FinishTuning::kChannels + threadIdx.x;
  *item = total;
  Fold(item, threadIdx.y, FinishTuning::kThreads, FinishTuning::kChannels);
  return *item;
}

template <typename F>
__global__ void __launch_bounds__(FinishTuning::kThreads* FinishTuning::kChannels)
    FinishMomentsKernel(Problem problem, ForwardArrays arrays, const PartialMoments<double>* partials, int64_t splits) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * FinishTuning::kChannels + threadIdx.x;
  const PartialMoments<double> total = MergeSplits(partials, splits, problem.channels, c);
  if (threadIdx.y == 0 && c < problem.channels) {
    FinishStatistics<F>(problem, arrays, Moments<double>{total.count, total.mean, total.m2}, c);
  }
}

// `coefficients` may be null: nothing needs them where there is no element.
template <typename F>
__global__ void __launch_bounds__(FinishTuning::kThreads* FinishTuning::kChannels)
    FinishGradientKernel(Problem problem, BackwardArrays arrays, const GradientSums* partials, int64_t splits,
                         GradientCoefficients<F>* coefficients) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * FinishTuning::kChannels + threadIdx.x;
  const GradientSums total = MergeSplits(partials, splits, problem.channels, c);
  if (threadIdx.y == 0 && c < problem.channels) {
    const GradientCoefficients<F> result = FinishGradient<F>(problem, arrays, total.dz, total.dz_xc, c);
    if (coefficients) coefficients[c] = result;
  }
}

inline constexpr Extent kFinishBlock = {FinishTuning::kChannels, FinishTuning::kThreads};

inline Extent FinishGrid(int64_t channels) {
  return {static_cast<int>((channels + FinishTuning::kChannels - 1) / FinishTuning::kChannels)};
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_FINISH_CUH_
