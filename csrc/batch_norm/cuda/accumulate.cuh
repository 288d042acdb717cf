// Sums over a thread's share of each channel, and their merge over a block. Deterministic: the order of every sum
// follows from the tiling alone.
//
// A thread sums in short chains, one to each lane of its vectors, and closes a chain into its total every
// Tuning::kChain vectors. So rounding errors grow with the length of a chain plus the number of chains, not with their
// product.

#ifndef TFOPS_BATCH_NORM_CUDA_ACCUMULATE_CUH_
#define TFOPS_BATCH_NORM_CUDA_ACCUMULATE_CUH_

#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/batch_norm/cuda/types.cuh"
#include "csrc/batch_norm/moments.h"

namespace tfops::cuda {

// Moments with the mean in double, and only the mean: in float it would be off by up to |mean| * 2^-24, which is not
// small beside the standard deviation, and deltas of means would bring that into m2. The rest is as good in float, and
// on most GPUs double arithmetic is 64 times slower.
template <typename F>
struct PartialMoments {
  double mean;
  F count;
  F m2;

  // Merges another set by Chan's rule, as Merge() of moments.h does.
  __device__ __forceinline__ void Merge(const PartialMoments& other) {
    if (other.count == F(0)) return;
    const F delta = static_cast<F>(other.mean - mean);
    const F weight = other.count / (count + other.count);
    const double step = static_cast<double>(delta * weight);
    mean = count == F(0) ? other.mean : MergedMean(mean, other.mean, step);
    m2 = count == F(0) ? other.m2 : m2 + other.m2 + delta * delta * (count * weight);
    count += other.count;
  }

  __device__ __forceinline__ PartialMoments<double> InDouble() const { return {mean, count, m2}; }
};

// Sums of x - shift and of its square, in chains. The shift of a chain is the mean of those before it: what its
// distance from the chain's own mean adds to the squares, and loses to rounding, it adds to m2 as well. Only the first
// chain has to take the shift from its first element, which may be an outlier, and so is a short one.
template <typename F, int kLanes>
class MomentsAccumulator {
 public:
  using Partial = PartialMoments<F>;

  __device__ __forceinline__ void Add(const F (&x)[kLanes]) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!started_) shift_[lane] = FiniteOrZero(x[lane]);
      const F deviation = x[lane] - shift_[lane];
      sum_[lane] += deviation;
      squares_[lane] = MultiplyAdd(deviation, deviation, squares_[lane]);
    }
    started_ = true;
    ++chain_;
  }

  // Closes the chain if it is nearly full. It has to be called after no more than `steps` calls of Add().
  __device__ __forceinline__ void CloseLongChain(int steps) {
    if (count_ == F(0) || chain_ > Tuning::kChain - steps) CloseChain();
  }

  __device__ __forceinline__ void CloseChain() {
    if (chain_ == 0) return;
    const F length = static_cast<F>(chain_);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const Moments<F> shifted = MomentsOfShifted(length, F(0), sum_[lane], squares_[lane]);
      Partial total = Total(lane);
      total.Merge({static_cast<double>(shift_[lane]) + static_cast<double>(shifted.mean), length, shifted.m2});
      mean_[lane] = total.mean;
      m2_[lane] = total.m2;
      shift_[lane] = FiniteOrZero(static_cast<F>(total.mean));
      sum_[lane] = squares_[lane] = 0;
    }
    count_ += length;
    chain_ = 0;
  }

  __device__ __forceinline__ Partial Total(int lane) const { return {mean_[lane], count_, m2_[lane]}; }

 private:
  bool started_ = false;
  int chain_ = 0;  // vectors in the open chain
  F shift_[kLanes] = {};
  F sum_[kLanes] = {};
  F squares_[kLanes] = {};
  F count_ = 0;  // the moments of the closed chains: count_, mean_, m2_
  double mean_[kLanes] = {};
  F m2_[kLanes] = {};
};

struct GradientSums {
  double dz;
  double dz_xc;

  __device__ __forceinline__ void Merge(const GradientSums& other) {
    dz += other.dz;
    dz_xc += other.dz_xc;
  }

  __device__ __forceinline__ GradientSums InDouble() const { return *this; }
};

template <typename F, int kLanes>
class GradientAccumulator {
 public:
  using Partial = GradientSums;

  __device__ __forceinline__ void Add(const F (&dz)[kLanes], const F (&xc)[kLanes]) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      sum_dz_[lane] += dz[lane];
      sum_dz_xc_[lane] = MultiplyAdd(dz[lane], xc[lane], sum_dz_xc_[lane]);
    }
    ++chain_;
  }

  __device__ __forceinline__ void CloseLongChain(int steps) {
    if (chain_ > Tuning::kChain - steps) CloseChain();
  }

  __device__ __forceinline__ void CloseChain() {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      total_dz_[lane] += sum_dz_[lane];
      total_dz_xc_[lane] += sum_dz_xc_[lane];
      sum_dz_[lane] = sum_dz_xc_[lane] = 0;
    }
    chain_ = 0;
  }

  __device__ __forceinline__ Partial Total(int lane) const { return {total_dz_[lane], total_dz_xc_[lane]}; }

 private:
  int chain_ = 0;
  F sum_dz_[kLanes] = {};
  F sum_dz_xc_[kLanes] = {};
  F total_dz_[kLanes] = {};
  F total_dz_xc_[kLanes] = {};
};

// Folds `count` items, `stride` apart, into the first; count is a power of two, and `rank` the place of the calling
// thread's item among them. All threads of the block take part, each group of `count` threads in a fold of its own.
template <typename Partial>
__device__ __forceinline__ void Fold(Partial* item, int rank, int count, int stride) {
  for (int half = count / 2; half > 0; half /= 2) {
    __syncthreads();
    if (rank < half) item[0].Merge(item[half * stride]);
  }
}

// Merges a block's totals. Afterwards partials[lane][thread] is that of the channel of this lane, for the threads with
// z == 0 (rows); or partials[0][thread] that of the thread's only channel, for those with x == z == 0 (planes).
template <int kLanes, int kThreads, typename Accumulator>
__device__ __forceinline__ void MergeBlock(const Accumulator& accumulator, bool planes,
                                           typename Accumulator::Partial (&partials)[kLanes][kThreads]) {
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) partials[lane][thread] = accumulator.Total(lane);
  if (planes) {
    for (int lane = 1; lane < kLanes; ++lane) partials[0][thread].Merge(partials[lane][thread]);
    Fold(&partials[0][thread], threadIdx.x, blockDim.x, 1);
  }
  for (int lane = 0; lane < (planes ? 1 : kLanes); ++lane) {
    Fold(&partials[lane][thread], threadIdx.z, blockDim.z, blockDim.x * blockDim.y);
  }
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_ACCUMULATE_CUH_
