// The merge of the splits' partial results, in double and in a fixed order, and what follows from it for a channel.
//
// It is a kernel of its own, not the work of the last block to arrive at the end of the phase before: that needs
// counters that something has to zero, which is as good as a launch too, and one block for each slab of channels would
// merge alone what here takes a block for one to four of them.

#ifndef TFOPS_BATCH_NORM_CUDA_FINISH_CUH_
#define TFOPS_BATCH_NORM_CUDA_FINISH_CUH_

#include "csrc/batch_norm/cuda/extent.h"
#include "csrc/batch_norm/cuda/streaming.h"
#include "csrc/batch_norm/cuda/sums.cuh"
#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cuda {

// The partial results partials[unit][split], and which units are of a channel; see tiling.h.
struct PartialsShape {
  int64_t splits = 0;
  int64_t units = 0;
  int64_t channels = 0;
  int repeat = 1;
  int pixels = 1;

  TFOPS_INLINE int64_t OfChannel() const { return splits * repeat * pixels; }
};

// Blocks of (x, y): x threads, one or more whole warps, for each of y channels.
inline Extent FinishBlock(const PartialsShape& shape) {
  const int threads = shape.OfChannel() > FinishTuning::kMostOfWarp ? FinishTuning::kThreads : 32;
  return {threads, FinishTuning::kThreads / threads};
}

inline Extent FinishGrid(const PartialsShape& shape) {
  const int channels = FinishBlock(shape).y;
  return {static_cast<int>((shape.channels + channels - 1) / channels)};
}

__device__ __forceinline__ int64_t ChannelToFinish() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

// The merge of all that is of channel c, for threads with x == 0. No splits: the partial result of nothing.
template <typename Partial>
__device__ __forceinline__ Partial MergeSplits(const Partial* partials, const PartialsShape& shape, int64_t c) {
  const int64_t count = c < shape.channels ? shape.OfChannel() : 0;
  // There are fewer than 2^31 of a channel: units are made of 64 elements or more.
  const unsigned splits = static_cast<unsigned>(shape.splits), pixels = static_cast<unsigned>(shape.pixels);
  const auto get = [&](int64_t i) {
    const unsigned within = static_cast<unsigned>(i) / splits;
    const unsigned turn = within / pixels;
    const int64_t unit = (turn * shape.channels + c) * shape.pixels + (within - turn * pixels);
    return partials[unit * shape.splits + (static_cast<unsigned>(i) - within * splits)];
  };
  SumOf<Partial> sum = SumByWarps<Partial>(count, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), get);
  auto& sums = BlockShared<SumOf<Partial>[FinishTuning::kThreads / 32]>();
  const int warp = ThreadInBlock() / 32;
  if (threadIdx.x % 32 == 0) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int other = 1; other < static_cast<int>(blockDim.x) / 32; ++other) sum.Add(sums[warp + other]);
  }
  return sum.Result();
}

template <typename F>
__global__ void __launch_bounds__(FinishTuning::kThreads)
    FinishMomentsKernel(Problem problem, ForwardArrays arrays, const Moments<double>* partials, PartialsShape shape) {
  const int64_t c = ChannelToFinish();
  const Moments<double> total = MergeSplits(partials, shape, c);
  if (threadIdx.x == 0 && c < problem.channels) FinishStatistics<F>(problem, arrays, total, c);
}

// Finishes the phase of moments by itself: writes count, mean and variance.
template <typename F>
__global__ void __launch_bounds__(FinishTuning::kThreads)
    FinishBatchMomentsKernel(MomentsArrays arrays, const Moments<double>* partials, PartialsShape shape) {
  const int64_t c = ChannelToFinish();
  const Moments<double> total = MergeSplits(partials, shape, c);
  if (threadIdx.x > 0 || c >= shape.channels) return;
  static_cast<F*>(arrays.count)[c] = static_cast<F>(total.count);
  static_cast<F*>(arrays.mean)[c] = static_cast<F>(total.mean);
  static_cast<F*>(arrays.variance)[c] = static_cast<F>(total.count > 0 ? total.m2 / total.count : 0);
}

// Gathers the coefficients of dx as they were given.
template <typename F>
__global__ void __launch_bounds__(FinishTuning::kThreads)
    GatherCoefficientsKernel(StatisticsGradient statistics, int64_t channels, GradientCoefficients<F>* coefficients) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  coefficients[c] = {F(0), static_cast<const F*>(statistics.tilt)[c], static_cast<const F*>(statistics.shift)[c]};
}

// `coefficients` may be null: nothing needs them where there is no element.
template <typename F>
__global__ void __launch_bounds__(FinishTuning::kThreads)
    FinishGradientKernel(Problem problem, BackwardArrays arrays, const GradientSums* partials, PartialsShape shape,
                         GradientCoefficients<F>* coefficients) {
  const int64_t c = ChannelToFinish();
  const GradientSums total = MergeSplits(partials, shape, c);
  if (threadIdx.x == 0 && c < problem.channels) {
    const GradientCoefficients<F> result = FinishGradient<F>(problem, arrays, total.dz, total.dz_xc, c);
    if (coefficients) coefficients[c] = result;
  }
}

inline PartialsShape ShapeOf(const StreamingTiling& tiling) {
  return {tiling.Splits(), tiling.units, tiling.channels, tiling.repeat, tiling.pixels};
}

// A thread for each channel.
inline Extent GatherGrid(int64_t channels) {
  return {static_cast<int>((channels + FinishTuning::kThreads - 1) / FinishTuning::kThreads)};
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_FINISH_CUH_
