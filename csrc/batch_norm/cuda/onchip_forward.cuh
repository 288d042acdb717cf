// The forward pass of the on-chip tiers, in training. See onchip.h.

#ifndef TFOPS_BATCH_NORM_CUDA_ONCHIP_FORWARD_CUH_
#define TFOPS_BATCH_NORM_CUDA_ONCHIP_FORWARD_CUH_

#include "csrc/batch_norm/cuda/elementwise.cuh"
#include "csrc/batch_norm/cuda/onchip.cuh"
#include "csrc/batch_norm/cuda/tuning.h"

namespace tfops::cuda {

// `exchanged` is for what the grid's blocks exchange. `taken` is null unless there are several virtual batches.
template <typename T, int kLanes>
__global__ void __launch_bounds__(OnChipTuning::kThreads, 1)
    OnChipForwardKernel(OnChip plan, Problem problem, ActivationIn<Arithmetic<T>> activation, ForwardArrays arrays,
                        void* exchanged, TakenIn* taken) {
  using F = Arithmetic<T>;
  using V = Vector<T, kLanes>;
  constexpr int kKept = OnChipVectors<kLanes>::kForward;
  constexpr int kBatch = OnChipTuning::kInFlight / 2;
  static_assert(kKept <= 32, "`inside` has a bit for each");
  const Share share(plan);
  const Held<T, kLanes> held{plan, share};
  const int slab_channels = plan.sums.results;

  // All that is kept is asked for at once: the residual is not needed before the moments are known.
  held.AskForAll([&](int step, int64_t offset) { V::LoadAsync(arrays.x, offset, &held.At(0, step)); });
  if (plan.keeps_residual) {
    auto walk = share.template Through<kLanes>(plan, 0, share.steps);
    for (int step = 0; !walk.Done(); ++step, walk.Advance()) {
      if (walk.Inside()) V::LoadAsync(arrays.residual, walk.Offset(), &held.Residual(step));
    }
  }
  CommitCopies();
  V kept[kKept];
  unsigned inside = 0;
  auto first = share.template Through<kLanes>(plan, 0, share.in_registers);
#pragma unroll
  for (int i = 0; i < kKept; ++i, first.Advance()) {
    if (!first.Inside()) continue;
    kept[i].LoadLast(arrays.x, first.Offset());
    inside |= 1u << i;
  }
  // mean, slope and offset of each channel; until the mean is known, scale is in the place of the slope.
  F* const channels = SharedAt<F>(plan.channels_at);
  for (int c = threadIdx.x; c < share.channels; c += blockDim.x) {
    channels[slab_channels + c] = static_cast<const F*>(arrays.scale)[share.first_channel + c];
    channels[2 * slab_channels + c] = static_cast<const F*>(arrays.offset)[share.first_channel + c];
  }

  MomentsAccumulator<F, kLanes> accumulator;
#pragma unroll 1
  for (int i = 0; i < share.in_registers; ++i) {
    if (!(inside >> i & 1)) continue;
    F values[kLanes];
    Pick(kept, i).Unpack(values);
    accumulator.Add(values);
  }
  accumulator.CloseChain();
  auto rest = share.template Through<kLanes>(plan, share.Kept(), share.steps - share.Kept());
  AddMoments<T, OnChipTuning::kInFlight>(&rest, arrays.x, Mask{}, &accumulator);
  held.template UseAll<1>(&accumulator, [&](int step) {
    F values[kLanes];
    V{held.At(0, step)}.Unpack(values);
    accumulator.Add(values);
  });

  auto* const own = SharedAt<Moments<double>>(plan.own_at);
  const F most = static_cast<F>(int64_t{plan.share_steps} * plan.sums.numbers * (plan.planes ? kLanes : 1));
  MomentsOverBlock(plan, share.place, most, accumulator, OnChipSumsMemory<F>(plan),
                   [&](int c, const Moments<double>& moments) { own[c] = moments; });
  MeetGroup(plan, share, own, channels, exchanged, [&](int c, const Moments<double>& merged) {
    const SavedStatistics<F> saved = StatisticsToSave<F>(problem, merged);
    return Pair<F>{saved.mean, channels[slab_channels + c] * saved.inv_std};
  });
  ForMerged(plan, share, own, [&](int c, const Moments<double>& merged) {
    const int64_t channel = share.first_channel + c;
    FinishRunningStatistics<F>(problem, arrays, merged, channel, blockIdx.z * problem.channels + channel, taken);
  });
  // In a loop of its own, which leaves more registers to either.
  ForMerged(plan, share, own, [&](int c, const Moments<double>& merged) {
    WriteSavedStatistics<F>(problem, arrays, merged, blockIdx.z * problem.channels + share.first_channel + c);
  });

  Affine<F, kLanes> affine;
  ForResults<kLanes>(plan, share.place, [&](int lane, int c) {
    affine.mean[lane] = channels[c];
    affine.slope[lane] = channels[slab_channels + c];
    affine.offset[lane] = channels[2 * slab_channels + c];
  });
  const bool folds_bits = arrays.activation_bits && plan.Folded();
  const bool loads_residual = problem.has_residual && !plan.keeps_residual;
  WaitForCopies<0>();
  auto walk = share.template Through<kLanes, Direction::kBackward>(plan, 0, share.steps);
  for (int step = share.steps - 1; !walk.Done();) {
    V x[kBatch], residual[kBatch];
    auto ahead = walk;
#pragma unroll
    for (int i = 0; i < kBatch; ++i, ahead.Advance()) {
      if (!ahead.Inside()) continue;
      if (step - i >= share.Kept()) x[i].LoadLast(arrays.x, ahead.Offset());
      if (loads_residual) residual[i].LoadLast(arrays.residual, ahead.Offset());
      // The next batch is on its way to L2 meanwhile.
      const bool reads_x = step - i - kBatch >= share.Kept();
      if (step - i < kBatch || !(reads_x || loads_residual)) continue;
      ahead.IfAhead(kBatch, [&](int64_t offset) {
        if (reads_x) V::Prefetch(arrays.x, offset);
        if (loads_residual) V::Prefetch(arrays.residual, offset);
      });
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i, --step, walk.Advance()) {
      unsigned bits = 0;
      if (walk.Inside()) {
        if (step < share.in_registers) {
          x[i] = Pick(kept, step);
        } else if (step < share.Kept()) {
          x[i].word = held.At(0, step);
        }
        F z[kLanes];
        x[i].Unpack(z);
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) z[lane] = affine.Apply(z[lane] - affine.mean[lane], lane);
        if (problem.has_residual) {
          if (plan.keeps_residual) residual[i].word = held.Residual(step);
          F added[kLanes];
          residual[i].Unpack(added);
#pragma unroll
          for (int lane = 0; lane < kLanes; ++lane) z[lane] += added[lane];
        }
        bits = ActivateVector(activation, arrays.activation_bits != nullptr, z);
        x[i].Pack(z);
        x[i].StoreNext(arrays.y, walk.Offset());
      }
      if (folds_bits) {
        if (walk.Inside()) held.Bits(step) = static_cast<uint8_t>(bits);
      } else if (arrays.activation_bits) {
        const unsigned byte = GatherByte<kLanes>(bits);
        if (walk.Inside() && walk.BitInByte() == 0) {
          StoreGlobal(arrays.activation_bits + walk.BitsOffset(plan, blockIdx.z), static_cast<uint8_t>(byte));
        }
      }
    }
  }
  if (folds_bits) {
    __syncthreads();
    WriteFoldedBits<kLanes>(plan, share, arrays.activation_bits);
  }
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_ONCHIP_FORWARD_CUH_
