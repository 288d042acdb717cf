// The backward pass of the on-chip tiers: one read of all that it needs, one write of dx and dresidual. See onchip.h.

#ifndef TFOPS_BATCH_NORM_CUDA_ONCHIP_BACKWARD_CUH_
#define TFOPS_BATCH_NORM_CUDA_ONCHIP_BACKWARD_CUH_

#include "csrc/batch_norm/cuda/gradient.cuh"
#include "csrc/batch_norm/cuda/onchip.cuh"
#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cuda {

// `exchanged` is for the grid's partial results. `dresidual` is null if it is not wanted, or as good as written.
template <typename T, int kLanes>
__global__ void __launch_bounds__(OnChipTuning::kThreads, 1)
    OnChipBackwardKernel(OnChip plan, Problem problem, BackwardArrays arrays, AffineArrays affine_arrays,
                         GradientArrays gradient, void* dresidual, GradientSums* exchanged) {
  using F = Arithmetic<T>;
  using HeldWords = Held<T, kLanes>;
  constexpr int kBatch = OnChipBatch<kLanes>::kBackward;
  const Share share(plan);
  auto walk = share.WalkShare<kLanes>(plan);
  const Affine<F, kLanes> affine(affine_arrays, plan, walk);

  F sum_dz[kLanes] = {}, sum_dz_xc[kLanes] = {};
  for (int step = 0; !walk.Done(); step += kBatch) {
    GradientStep<T, kLanes> batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      batch[i].template Load<true, true>(gradient, plan, walk);
      walk.Advance();
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!batch[i].Inside()) continue;
      F dz[kLanes], xc[kLanes];
      batch[i].Compute(gradient, problem.activation, affine, dz, xc);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        sum_dz[lane] += dz[lane];
        sum_dz_xc[lane] = MultiplyAdd(dz[lane], xc[lane], sum_dz_xc[lane]);
      }
      HeldWords::At(plan, 0, step + i) = batch[i].dy.word;
      HeldWords::At(plan, 1, step + i) = batch[i].x.word;
      if (gradient.residual) HeldWords::At(plan, 2, step + i) = batch[i].residual.word;
      if (gradient.activation_bits) HeldWords::Bits(plan, step + i) = static_cast<uint8_t>(batch[i].bits);
    }
  }

  double* const totals = SharedAt<double>(plan.totals_at);
  SumOverBlock(plan, share, sum_dz, totals);
  SumOverBlock(plan, share, sum_dz_xc, totals + plan.slab_channels);
  auto* const own = SharedAt<GradientSums>(plan.own_at);
  const int c = threadIdx.x;
  if (c < plan.slab_channels) own[c] = {totals[c], totals[c + plan.slab_channels]};
  const GradientSums* const theirs = Collect(plan, share, own, exchanged);

  F* const coefficients = SharedAt<F>(plan.channels_at);
  const bool of_channel = c < share.channels;
  GradientSums sums = {};
  if (of_channel) {
#pragma unroll 4
    for (int rank = 0; rank < plan.group; ++rank) sums.Merge(theirs[rank * plan.slab_channels + c]);
    const GradientCoefficients<F> result =
        CoefficientsOfGradient<F>(problem, arrays, sums.dz, sums.dz_xc, share.first_channel + c);
    coefficients[c] = result.tilt;
    coefficients[c + plan.slab_channels] = result.shift;
  }
  __syncthreads();
  if (of_channel && share.rank == 0) {
    WriteGradients<F>(problem, arrays, sums.dz, sums.dz_xc, share.first_channel + c);
  }

  F tilt[kLanes], shift[kLanes];
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    const F* const of_lane = coefficients + share.Channel<kLanes>(plan, lane);
    tilt[lane] = of_lane[0];
    shift[lane] = of_lane[plan.slab_channels];
  }
  walk = share.WalkShare<kLanes>(plan);
  for (int step = 0; !walk.Done(); ++step) {
    if (walk.Inside()) {
      GradientStep<T, kLanes> held = {};
      held.dy.word = HeldWords::At(plan, 0, step);
      held.x.word = HeldWords::At(plan, 1, step);
      if (gradient.residual) held.residual.word = HeldWords::At(plan, 2, step);
      if (gradient.activation_bits) held.bits = HeldWords::Bits(plan, step);
      F dz[kLanes], xc[kLanes];
      held.Compute(gradient, problem.activation, affine, dz, xc);
      Vector<T, kLanes> result;
      if (dresidual) {
        result.Pack(dz);
        result.StoreNext(dresidual, walk.Offset());
      }
      InputGradientVector(problem.training, affine, tilt, shift, xc, dz);
      result.Pack(dz);
      result.StoreNext(arrays.dx, walk.Offset());
    }
    walk.Advance();
  }
  LeaveTogether(plan);
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_ONCHIP_BACKWARD_CUH_
