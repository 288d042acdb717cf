// The forward pass of the on-chip tiers, in training: one read of x and residual, one write of y. See onchip.h.

#ifndef TFOPS_BATCH_NORM_CUDA_ONCHIP_FORWARD_CUH_
#define TFOPS_BATCH_NORM_CUDA_ONCHIP_FORWARD_CUH_

#include "csrc/batch_norm/cuda/elementwise.cuh"
#include "csrc/batch_norm/cuda/onchip.cuh"
#include "csrc/batch_norm/cuda/tuning.h"

namespace tfops::cuda {

// A thread's sums about the mean of its first few vectors, one chain for each lane. A chain is short, what a thread can
// hold, and that mean within a few standard deviations of its own: see MomentsOfShifted().
template <typename F, int kLanes>
class HeldMoments {
 public:
  __device__ __forceinline__ bool Started() const { return count_ > 0; }

  // Sets the shift, where any of the vectors is inside.
  template <typename T, int kBatch>
  __device__ __forceinline__ void Start(const Vector<T, kLanes> (&batch)[kBatch], const bool (&inside)[kBatch]) {
    int count = 0;
    F sum[kLanes] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!inside[i]) continue;
      F values[kLanes];
      batch[i].Unpack(values);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) sum[lane] += values[lane];
      ++count;
    }
    const F weight = F(1) / static_cast<F>(count);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) shift_[lane] = FiniteOrZero(sum[lane] * weight);
  }

  __device__ __forceinline__ void Add(const F (&x)[kLanes]) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const F deviation = x[lane] - shift_[lane];
      sum_[lane] += deviation;
      squares_[lane] = MultiplyAdd(deviation, deviation, squares_[lane]);
    }
    ++count_;
  }

  // The block's moments of each channel of the slab. Means are summed first. About that mean, which rounding has moved
  // a little, the chains' own are summed again, and their squares with what the chains have about themselves.
  __device__ __forceinline__ void SumOverBlock(const OnChip& plan, const Share& share,
                                               PartialMoments<double>* own) const {
    double* const totals = SharedAt<double>(plan.totals_at);
    const F block_count = static_cast<F>(share.Count(plan));
    const F count = static_cast<F>(count_);
    F mean[kLanes], m2[kLanes], values[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const Moments<F> moments = MomentsOfShifted(count, F(0), sum_[lane], squares_[lane]);
      mean[lane] = moments.mean;  // about the shift
      m2[lane] = moments.m2;
      values[lane] = count_ == 0 ? F(0) : (shift_[lane] + mean[lane]) * (count / block_count);
    }
    cuda::SumOverBlock(plan, share, values, totals);
    F rough[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      rough[lane] = static_cast<F>(totals[share.Channel<kLanes>(plan, lane)]);
      const F delta = (shift_[lane] - rough[lane]) + mean[lane];
      values[lane] = count_ == 0 ? F(0) : delta * count;
      m2[lane] = count_ == 0 ? F(0) : MultiplyAdd(delta, delta * count, m2[lane]);
    }
    double* const sums = totals + plan.slab_channels;
    cuda::SumOverBlock(plan, share, values, sums);
    const int c = threadIdx.x;
    const bool of_channel = c < plan.slab_channels;
    const double center = of_channel ? static_cast<F>(totals[c]) : F(0);
    cuda::SumOverBlock(plan, share, m2, totals);
    if (of_channel) {
      const double n = static_cast<double>(share.Count(plan));
      const double shift = n > 0 ? sums[c] / n : 0.0;
      const double m2_total = totals[c] - sums[c] * shift;
      // Beside an infinite center there is no shift, which is NaN then.
      own[c] = {center + FiniteOrZero(shift), n, m2_total < 0 ? 0.0 : m2_total};
    }
  }

 private:
  int count_ = 0;
  F shift_[kLanes] = {};
  F sum_[kLanes] = {};
  F squares_[kLanes] = {};
};

// `exchanged` is for the grid's partial results.
template <typename T, int kLanes>
__global__ void __launch_bounds__(OnChipTuning::kThreads, 1)
    OnChipForwardKernel(OnChip plan, Problem problem, ForwardArrays arrays, PartialMoments<double>* exchanged) {
  using F = Arithmetic<T>;
  using HeldWords = Held<T, kLanes>;
  constexpr int kBatch = OnChipBatch<kLanes>::kForward;
  const Share share(plan);
  const int c = threadIdx.x;
  const bool of_channel = c < share.channels;
  // Scale and offset are not needed before the moments are known, and should be here by then.
  const F scale = of_channel ? static_cast<const F*>(arrays.scale)[share.first_channel + c] : F(0);
  const F offset = of_channel ? static_cast<const F*>(arrays.offset)[share.first_channel + c] : F(0);

  auto walk = share.WalkShare<kLanes>(plan);
  HeldMoments<F, kLanes> held;
  for (int step = 0; !walk.Done(); step += kBatch) {
    Vector<T, kLanes> x[kBatch], residual[kBatch];
    bool inside[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      inside[i] = walk.Inside();
      if (inside[i]) {
        x[i].LoadLast(arrays.x, walk.Offset());
        if (plan.holds_residual) residual[i].LoadLast(arrays.residual, walk.Offset());
      }
      walk.Advance();
    }
    if (!held.Started()) held.Start(x, inside);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!inside[i]) continue;
      F values[kLanes];
      x[i].Unpack(values);
      held.Add(values);
      HeldWords::At(plan, 0, step + i) = x[i].word;
      if (plan.holds_residual) HeldWords::At(plan, 1, step + i) = residual[i].word;
    }
  }

  auto* const own = SharedAt<PartialMoments<double>>(plan.own_at);
  held.SumOverBlock(plan, share, own);
  const PartialMoments<double>* const theirs = Collect(plan, share, own, exchanged);
  F* const coefficients = SharedAt<F>(plan.channels_at);
  Moments<double> moments = {};
  if (of_channel) {
    moments = MergeAll(theirs + c, plan.group, plan.slab_channels);
    const SavedStatistics<F> saved = StatisticsToSave<F>(problem, moments);
    coefficients[c] = saved.mean;
    coefficients[c + plan.slab_channels] = scale * saved.inv_std;
    coefficients[c + 2 * plan.slab_channels] = offset;
  }
  __syncthreads();
  if (of_channel && share.rank == 0) FinishStatistics<F>(problem, arrays, moments, share.first_channel + c);

  Affine<F, kLanes> affine;
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    const F* const of_lane = coefficients + share.Channel<kLanes>(plan, lane);
    affine.mean[lane] = of_lane[0];
    affine.slope[lane] = of_lane[plan.slab_channels];
    affine.offset[lane] = of_lane[2 * plan.slab_channels];
  }
  const bool folds_bits = arrays.activation_bits && plan.Folded();
  const bool loads_residual = problem.has_residual && !plan.holds_residual;
  walk = share.WalkShare<kLanes>(plan);
  for (int step = 0; !walk.Done();) {
    Vector<T, kLanes> residual[kBatch];
    if (loads_residual) {
      auto ahead = walk;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (ahead.Inside()) residual[i].LoadLast(arrays.residual, ahead.Offset());
        ahead.Advance();
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i, ++step) {
      unsigned bits = 0;
      if (walk.Inside()) {
        Vector<T, kLanes> vector{HeldWords::At(plan, 0, step)};
        F z[kLanes];
        vector.Unpack(z);
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) z[lane] = affine.Apply(z[lane] - affine.mean[lane], lane);
        if (problem.has_residual) {
          if (plan.holds_residual) residual[i].word = HeldWords::At(plan, 1, step);
          F added[kLanes];
          residual[i].Unpack(added);
#pragma unroll
          for (int lane = 0; lane < kLanes; ++lane) z[lane] += added[lane];
        }
        bits = ActivateVector(problem.activation, z);
        vector.Pack(z);
        vector.StoreNext(arrays.y, walk.Offset());
      }
      if (folds_bits) {
        if (walk.Inside()) HeldWords::Bits(plan, step) = static_cast<uint8_t>(bits);
      } else if (arrays.activation_bits) {
        const unsigned byte = GatherByte<kLanes>(bits);
        if (walk.Inside() && walk.BitInByte() == 0) {
          StoreGlobal(arrays.activation_bits + walk.BitsOffset(plan), static_cast<uint8_t>(byte));
        }
      }
      walk.Advance();
    }
  }
  if (folds_bits) {
    __syncthreads();
    WriteFoldedBits<kLanes>(plan, share, arrays.activation_bits);
  }
  LeaveTogether(plan);
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_ONCHIP_FORWARD_CUH_
