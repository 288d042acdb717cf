// The merge of the splits' partial results, in double and in a fixed order, and what follows from it for a channel.
//
// It is a kernel of its own, not the work of the last block to arrive at the end of the phase before: that needs
// counters that something has to zero, which is as good as a launch too, and one block for each slab of channels would
// merge alone what here takes a block for one to four of them.

#ifndef TFOPS_BATCH_NORM_CUDA_FINISH_CUH_
#define TFOPS_BATCH_NORM_CUDA_FINISH_CUH_

#include <algorithm>

#include "csrc/batch_norm/cuda/extent.h"
#include "csrc/batch_norm/cuda/streaming.h"
#include "csrc/batch_norm/cuda/sums.cuh"
#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cuda {

// The partial results partials[virtual batch][unit][split], and which units are of a channel; see tiling.h.
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

// The merge of all that is of channel c in the block's virtual batch, for threads with x == 0. No splits: the partial
// result of nothing.
template <typename Partial>
__device__ __forceinline__ Partial MergeSplits(const Partial* partials, const PartialsShape& shape, int64_t c) {
  partials += static_cast<int64_t>(blockIdx.z) * shape.units * shape.splits;
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

// `taken` is null unless there are several virtual batches; so is `shared` below.
template <typename F>
__global__ void __launch_bounds__(FinishTuning::kThreads)
    FinishMomentsKernel(Problem problem, ForwardArrays arrays, const Moments<double>* partials, PartialsShape shape,
                        TakenIn* taken) {
  const int64_t c = ChannelToFinish();
  const Moments<double> total = MergeSplits(partials, shape, c);
  if (threadIdx.x > 0 || c >= problem.channels) return;
  const int64_t own = blockIdx.z * problem.channels + c;
  FinishRunningStatistics<F>(problem, arrays, total, c, own, taken);
  WriteSavedStatistics<F>(problem, arrays, total, own);
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
                         GradientCoefficients<F>* coefficients, SharedGradients* shared) {
  const int64_t c = ChannelToFinish();
  const int64_t before = static_cast<int64_t>(blockIdx.z) * shape.channels;
  const GradientSums total = MergeSplits(partials, shape, c);
  if (threadIdx.x > 0 || c >= problem.channels) return;
  if (arrays.inv_std) arrays.inv_std = static_cast<const F*>(arrays.inv_std) + before;
  FinishGradient<F>(problem, arrays, total.dz, total.dz_xc, c, before + c, shared);
  if (coefficients) coefficients[before + c] = CoefficientsOfGradient<F>(problem, arrays, total.dz, total.dz_xc, c);
}

// What all virtual batches have of channel c, added up by a warp, for its first lane.
template <typename Get>
__device__ __forceinline__ GradientSums SumOfVirtualBatches(int64_t count, const Get& get) {
  return SumByWarps<GradientSums>(count, static_cast<int>(threadIdx.x), 32, get).Result();
}

// Writes the running statistics, which take in the average of what [V, C] has for them to take in.
template <typename F>
__global__ void __launch_bounds__(FinishTuning::kThreads)
    AverageVirtualBatchesKernel(Problem problem, ForwardArrays arrays, const TakenIn* taken) {
  const int64_t c = ChannelToFinish();
  if (c >= problem.channels) return;
  const GradientSums sums = SumOfVirtualBatches(problem.virtual_batches, [&](int64_t k) {
    const TakenIn each = taken[k * problem.channels + c];
    return GradientSums{each.mean, each.variance};
  });
  if (threadIdx.x == 0) WriteAverageStatistics<F>(problem, arrays, TakenIn{sums.dz, sums.dz_xc}, c);
}

// Writes the gradients of scale and offset, which are sums over [V, C].
template <typename F>
__global__ void __launch_bounds__(FinishTuning::kThreads)
    AddVirtualBatchesKernel(Problem problem, BackwardArrays arrays, const SharedGradients* shared) {
  const int64_t c = ChannelToFinish();
  if (c >= problem.channels) return;
  const GradientSums sums = SumOfVirtualBatches(problem.virtual_batches, [&](int64_t k) {
    const SharedGradients each = shared[k * problem.channels + c];
    return GradientSums{each.offset, each.scale};
  });
  if (threadIdx.x > 0) return;
  static_cast<F*>(arrays.doffset)[c] = static_cast<F>(sums.dz);
  static_cast<F*>(arrays.dscale)[c] = static_cast<F>(sums.dz_xc);
}

// A warp for each channel.
constexpr Extent kMergeBlock = {32, FinishTuning::kThreads / 32};
inline Extent MergeGrid(int64_t channels) { return {static_cast<int>((channels + kMergeBlock.y - 1) / kMergeBlock.y)}; }

// The bytes that what virtual batches have in common takes of a workspace, [V, C] of a type of so many.
inline size_t CommonBytes(const Problem& problem, size_t bytes) {
  if (problem.virtual_batches == 1) return 0;
  return static_cast<size_t>(problem.virtual_batches * problem.channels) * bytes;
}

inline Extent OverVirtualBatches(Extent grid, int64_t count) {
  grid.z = static_cast<int>(count);
  return grid;
}

// Calls body(first, count) for as many virtual batches at a time as a launch may be over, while it succeeds.
template <typename Body>
Status ForVirtualBatches(const Problem& problem, const Body& body) {
  for (int64_t first = 0; first < problem.virtual_batches; first += kMostOfLaunch) {
    const Status status = body(first, std::min(kMostOfLaunch, problem.virtual_batches - first));
    if (!status.ok()) return status;
  }
  return {};
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
