// The backward pass of the on-chip tiers. See onchip.h.

#ifndef TFOPS_BATCH_NORM_CUDA_ONCHIP_BACKWARD_CUH_
#define TFOPS_BATCH_NORM_CUDA_ONCHIP_BACKWARD_CUH_

#include "csrc/batch_norm/cuda/gradient.cuh"
#include "csrc/batch_norm/cuda/onchip.cuh"
#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cuda {

// `exchanged` is for what the grid's blocks exchange. `dresidual` is null if it is not wanted, or as good as written;
// `shared` is null unless there are several virtual batches.
template <typename T, int kLanes>
__global__ void __launch_bounds__(OnChipTuning::kThreads, 1)
    OnChipBackwardKernel(OnChip plan, Problem problem, ActivationIn<Arithmetic<T>> activation, BackwardArrays arrays,
                         AffineArrays affine_arrays, GradientArrays gradient, void* dresidual, void* exchanged,
                         SharedGradients* shared) {
  using F = Arithmetic<T>;
  using V = Vector<T, kLanes>;
  constexpr int kKept = OnChipVectors<kLanes>::kBackward;
  constexpr int kAhead = OnChipTuning::kInFlight;
  const Share share(plan);
  const Held<T, kLanes> held{plan, share};
  const int slab_channels = plan.sums.results;

  held.AskForAll([&](int step, int64_t offset) {
    V::LoadAsync(gradient.dy, offset, &held.At(0, step));
    V::LoadAsync(gradient.x, offset, &held.At(1, step));
    if (gradient.residual) V::LoadAsync(gradient.residual, offset, &held.At(2, step));
  });
  V kept_dy[kKept], kept_x[kKept];
  auto first = share.template Through<kLanes>(plan, 0, share.in_registers);
#pragma unroll
  for (int i = 0; i < kKept; ++i, first.Advance()) {
    if (!first.Inside()) continue;
    kept_dy[i].LoadLast(gradient.dy, first.Offset());
    kept_x[i].LoadLast(gradient.x, first.Offset());
  }

  auto walk = share.template Through<kLanes>(plan, 0, share.steps);
  const Affine<F, kLanes> affine(affine_arrays, plan, walk, blockIdx.z);
  GradientAccumulator<F, kLanes> accumulator;
  // What is not kept is asked for one step ahead; before it is summed, L2 fetches it some steps ahead.
  const auto fetch = [&](int step, const auto& at, GradientStep<T, kLanes>* vectors) __attribute__((always_inline)) {
    vectors->inside = at.Inside();
    if (!vectors->inside) return;
    if (step < share.in_registers) {
      vectors->dy = Pick(kept_dy, step);
      vectors->x = Pick(kept_x, step);
    } else if (step < share.Kept()) {
      vectors->dy.word = held.At(0, step);
      vectors->x.word = held.At(1, step);
      if (gradient.residual) vectors->residual.word = held.At(2, step);
    } else {
      vectors->template LoadVectors<false>(gradient, at);
    }
  };
  int arrived = share.in_registers;
  int group = 0;
  GradientStep<T, kLanes> vectors;
#pragma unroll 1
  for (int step = -1; step < share.steps; ++step) {
    GradientStep<T, kLanes> next;
    next.inside = false;
    if (step + 1 < share.steps) {
      while (step + 1 >= arrived && group < OnChipTuning::kCopyGroups) arrived = held.Await(group++);
      if (step + 1 >= share.Kept() && step + 1 + kAhead < share.steps) {
        walk.IfAhead(kAhead, [&](int64_t offset) {
          V::Prefetch(gradient.dy, offset);
          V::Prefetch(gradient.x, offset);
        });
      }
      fetch(step + 1, walk, &next);
      if (next.inside) next.template LoadBits<true>(gradient, plan, walk, blockIdx.z);
      walk.Advance();
    }
    if (step >= 0 && vectors.inside) {
      if (gradient.activation_bits) held.Bits(step) = static_cast<uint8_t>(vectors.bits);
      F dz[kLanes], xc[kLanes];
      vectors.Compute(gradient, activation, affine, dz, xc);
      accumulator.Add(dz, xc);
      accumulator.CloseLongChain(1);
    }
    vectors = next;
  }
  accumulator.CloseChain();

  auto* const own = SharedAt<GradientSums>(plan.own_at);
  GradientsOverBlock(plan, share.place, accumulator, OnChipSumsMemory<F>(plan),
                     [&](int c, const GradientSums& sums) { own[c] = sums; });
  F* const channels = SharedAt<F>(plan.channels_at);
  arrays.inv_std = static_cast<const F*>(arrays.inv_std) + blockIdx.z * plan.channels;
  MeetGroup(plan, share, own, channels, exchanged, [&](int c, const GradientSums& merged) {
    const GradientCoefficients<F> result =
        CoefficientsOfGradient<F>(problem, arrays, merged.dz, merged.dz_xc, share.first_channel + c);
    return Pair<F>{result.tilt, result.shift};
  });
  ForMerged(plan, share, own, [&](int c, const GradientSums& merged) {
    const int64_t channel = share.first_channel + c;
    FinishGradient<F>(problem, arrays, merged.dz, merged.dz_xc, channel, blockIdx.z * problem.channels + channel,
                      shared);
  });

  F tilt[kLanes], shift[kLanes];
  ForResults<kLanes>(plan, share.place, [&](int lane, int c) {
    tilt[lane] = channels[c];
    shift[lane] = channels[slab_channels + c];
  });
  auto back = share.template Through<kLanes, Direction::kBackward>(plan, 0, share.steps);
  int64_t offset = 0;
#pragma unroll 1
  for (int step = share.steps; step >= 0; --step) {
    GradientStep<T, kLanes> next;
    next.inside = false;
    if (step > 0) fetch(step - 1, back, &next);
    if (step < share.steps && vectors.inside) {
      if (gradient.activation_bits) vectors.bits = held.Bits(step);
      F dz[kLanes], xc[kLanes];
      vectors.Compute(gradient, activation, affine, dz, xc);
      V result;
      if (dresidual) {
        result.Pack(dz);
        result.StoreNext(dresidual, offset);
      }
      InputGradientVector(problem.training, affine, tilt, shift, xc, dz);
      result.Pack(dz);
      result.StoreNext(arrays.dx, offset);
    }
    offset = back.Offset();
    back.Advance();
    vectors = next;
  }
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_ONCHIP_BACKWARD_CUH_
