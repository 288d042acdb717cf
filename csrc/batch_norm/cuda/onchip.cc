// What lies where in the shared memory of the on-chip tiers.

#include "csrc/batch_norm/cuda/onchip.h"

#include <algorithm>
#include <cmath>

namespace tfops::cuda {
namespace {

// The largest item that blocks exchange: PartialMoments<double>.
constexpr int64_t kItemBytes = 24;

}  // namespace

void LayOut(const Problem& problem, Pass pass, int64_t shared_limit, OnChip* plan) {
  const int64_t size = ElementBytes(problem.dtype);
  const int64_t arithmetic = std::max<int64_t>(size, 4);
  plan->slots = plan->planes ? plan->block.y : plan->block.x * plan->lanes;
  plan->entries = plan->planes ? plan->block.x * plan->block.z : plan->block.z;
  plan->slab_channels = plan->planes ? plan->block.y : static_cast<int>(plan->slots / plan->UnitsPerChannel());
  // The two sums, of entries and then of parts, take the least time together if they are equally long.
  const int64_t per_channel = plan->UnitsPerChannel();
  const int even = static_cast<int>(std::lround(std::sqrt(static_cast<double>(plan->entries) / per_channel)));
  plan->parts = std::clamp(even, 1, std::max(plan->threads / plan->slots, 1));
  plan->held_steps = static_cast<int>(std::min<int64_t>(DivideUp(plan->steps, plan->group), INT32_MAX));

  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t start = at;
    at += (bytes + 15) / 16 * 16;
    return static_cast<int>(std::min<int64_t>(start, INT32_MAX));
  };
  plan->totals_at = take(2 * 8 * plan->slab_channels);
  plan->own_at = take(kItemBytes * plan->slab_channels);
  plan->channels_at = take(3 * arithmetic * plan->slab_channels);
  plan->scratch_at = take(arithmetic * plan->entries * plan->slots);
  plan->parts_at = take(8 * plan->parts * plan->slots);
  at = std::max(at, plan->scratch_at + kItemBytes * plan->group * plan->slab_channels);
  at = (at + 15) / 16 * 16;
  const int64_t slots = int64_t{plan->held_steps} * plan->threads;
  plan->bits_at = take(NeedsActivationBits(problem) && (pass == Pass::kBackward || plan->Folded()) ? slots : 0);
  const int64_t array = slots * plan->lanes * size;
  const int arrays = pass == Pass::kForward ? 1 : 2 + NeedsResidual(problem);
  plan->held_at = take(array * arrays);
  plan->holds_residual =
      pass == Pass::kBackward ? NeedsResidual(problem) : problem.has_residual && at + array <= shared_limit;
  if (pass == Pass::kForward && plan->holds_residual) take(array);
  plan->shared_bytes = static_cast<int>(std::min<int64_t>(at, INT32_MAX));
}

}  // namespace tfops::cuda
