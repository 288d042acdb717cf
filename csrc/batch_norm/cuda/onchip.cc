// What a block of the on-chip tiers keeps, and where.

#include "csrc/batch_norm/cuda/onchip.h"

#include <algorithm>

#include "csrc/batch_norm/cuda/tuning.h"

namespace tfops::cuda {
namespace {

template <int kLanes>
int KeptInRegisters(Pass pass) {
  return pass == Pass::kForward ? OnChipVectors<kLanes>::kForward : OnChipVectors<kLanes>::kBackward;
}

}  // namespace

int KeptInRegisters(Pass pass, int lanes) {
  return lanes == 2 ? KeptInRegisters<2>(pass) : lanes == 4 ? KeptInRegisters<4>(pass) : KeptInRegisters<8>(pass);
}

void LayOut(const Problem& problem, Pass pass, int64_t room, OnChip* plan) {
  const bool backward = pass == Pass::kBackward;
  const int64_t arithmetic = std::max(ElementBytes(problem.dtype), 4);
  const int64_t channels = plan->SlabChannels();
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t start = at;
    at += (bytes + 15) / 16 * 16;
    return static_cast<int>(std::min<int64_t>(start, INT32_MAX));
  };
  plan->totals_at = take((backward ? 2 : 4) * 8 * channels);
  plan->own_at = take((backward ? 2 : 3) * 8 * channels);
  plan->channels_at = take((backward ? 2 : 3) * arithmetic * channels);
  plan->numbers_at = take(arithmetic * plan->sums.numbers * plan->sums.units);
  plan->parts_at = take(8 * plan->sums.parts * plan->sums.units);

  const int64_t share = std::min<int64_t>(DivideUp(plan->steps, plan->group), INT32_MAX);
  const int64_t step_bytes = int64_t{plan->threads} * plan->lanes * ElementBytes(problem.dtype);
  const bool has_bits = NeedsActivationBits(problem) && (backward || plan->Folded());
  plan->bits_at = take(has_bits ? share * plan->threads : 0);
  // Where dz needs the residual too, registers do not have room for all that a vector takes.
  const bool in_registers = !(backward && NeedsResidual(problem));
  const int arrays = backward ? 2 + NeedsResidual(problem) : 1;
  plan->share_steps = static_cast<int>(share);
  plan->register_steps = in_registers ? std::min(KeptInRegisters(pass, plan->lanes), plan->share_steps) : 0;
  const int64_t wanted = share - plan->register_steps;
  const int64_t fits = std::max<int64_t>(room - at, 0) / (arrays * step_bytes);
  plan->shared_steps = static_cast<int>(std::min(wanted, fits));
  plan->kept_at = take(arrays * step_bytes * plan->shared_steps);
  plan->keeps_residual = !backward && problem.has_residual && wanted <= fits && at + share * step_bytes <= room;
  plan->residual_at = take(plan->keeps_residual ? share * step_bytes : 0);
  plan->shared_bytes = static_cast<int>(std::min<int64_t>(at, INT32_MAX));
}

}  // namespace tfops::cuda
