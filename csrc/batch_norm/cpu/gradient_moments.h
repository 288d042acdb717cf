// Sums of dz and dz * (x - mean), of the columns or planes of an item.

#ifndef TFOPS_BATCH_NORM_CPU_GRADIENT_MOMENTS_H_
#define TFOPS_BATCH_NORM_CPU_GRADIENT_MOMENTS_H_

#include "csrc/batch_norm/cpu/gradient.h"
#include "csrc/batch_norm/cpu/sums.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// Adds a chain to the partials of columns `begin` to `end`: `steps` times kRows rows from `row` on, which are `apart`
// rows apart within a step.
template <int kRows, typename T, typename K>
TFOPS_INLINE void AddGradientChain(const BackwardJob& job, int64_t item, int64_t row, int64_t steps, int64_t apart,
                                   int64_t begin, int64_t end) {
  using P = Param<T>;
  ColumnSums<P> sums;
  uint8_t buffers[kRows][kRunBitsBytes];
  const ColumnCoefficients<P> c(job.coefficients, begin);
  for (int64_t j = 0; j < end - begin; ++j) sums.first[j] = sums.second[j] = P(0);
  for (int64_t i = 0; i < steps; ++i) {
    GradientInputs<T, K> rows[kRows];
    for (int k = 0; k < kRows; ++k) {
      const Run run = RowRun(job.partition, row + i + k * apart, begin, end);
      const uint8_t* bits = BeginBits(job.problem, job.partition, run, job.arrays.activation_bits, buffers[k]);
      rows[k] = {job, run, bits, job.sums_ahead};
    }
    AddRows(rows, c, end - begin, &sums);
  }
  const int64_t slot = job.partition.Slot(item, begin);
  for (int64_t j = 0; j < end - begin; ++j) {
    job.partials.first[slot + j] += static_cast<double>(sums.first[j]);
    job.partials.second[slot + j] += static_cast<double>(sums.second[j]);
  }
}

// Adds less than a step's rows. It is out of line, for all chunks may have some, and little of it.
template <typename T, typename K>
__attribute__((noinline)) void AddLastGradientRows(const BackwardJob& job, int64_t item, int64_t row, int64_t count,
                                                   int64_t begin, int64_t end) {
  AddGradientChain<1, T, K>(job, item, row, count, 0, begin, end);
}

template <typename T, typename K>
TFOPS_INLINE void SumGradientColumns(const BackwardJob& job, int64_t item) {
  constexpr int kRowsAtOnce = 4;
  const int64_t slot = job.partition.Slot(item, job.partition.ColumnBegin(item));
  const int64_t columns = job.partition.ColumnEnd(item) - job.partition.ColumnBegin(item);
  for (int64_t j = slot; j < slot + columns; ++j) job.partials.first[j] = job.partials.second[j] = 0;
  const auto steps_of = [](int64_t) { return kChainRows / kRowsAtOnce; };
  const auto add = [&](auto rows_at_once, int64_t row, int64_t steps, int64_t apart, int64_t begin, int64_t end) {
    if constexpr (decltype(rows_at_once)::value == 1) {
      using Rest = std::conditional_t<K::kIsInPlace, K, Unknown>;
      AddLastGradientRows<T, Rest>(job, item, row, steps, begin, end);
    } else {
      AddGradientChain<kRowsAtOnce, T, K>(job, item, row, steps, apart, begin, end);
    }
  };
  ForEachColumnChain<kRowsAtOnce>(job.partition, item, steps_of, add);
}

// The sums of one channel, run after run.
template <typename T, typename K>
class PlaneGradientMoments {
  using P = Param<T>;

 public:
  void Begin() {
    sum_dz_ = sum_dz_xc_ = 0;
    Clear();
  }

  // Adds the elements of kRuns runs of this channel and length.
  template <int kRuns>
  TFOPS_INLINE void Add(const GradientInputs<T, K> (&runs)[kRuns], const Coefficients& coefficients, int64_t channel,
                        int64_t length) {
    const ChannelCoefficients<P> c(coefficients, channel);
    constexpr int64_t kPiece = kChainElements<kRuns, kChainRows, P>;
    for (int64_t begin = 0; begin < length; begin += kPiece) {
      const int64_t end = Min(begin + kPiece, length);
      const int64_t additions = AdditionsOf<kRuns, P>(end - begin);
      if (additions_ + additions > kChainRows) Flush();
      AddPiece(runs, c, begin, end, &sums_);
      additions_ += additions;
    }
  }

  void Finish(const Partials& partials, int64_t slot) {
    Flush();
    partials.first[slot] = sum_dz_;
    partials.second[slot] = sum_dz_xc_;
  }

 private:
  void Clear() {
    sums_.Clear();
    additions_ = 0;
  }
  void Flush() {
    sum_dz_ += PlaneSums<P>::Total(sums_.first);
    sum_dz_xc_ += PlaneSums<P>::Total(sums_.second);
    Clear();
  }

  PlaneSums<P> sums_;
  int64_t additions_;  // to each sum
  double sum_dz_;
  double sum_dz_xc_;
};

template <typename T>
void PartialGradientMoments(const BackwardJob& job, int64_t item) {
  WithKnownGradient</*kAddition=*/false>(job, job.sums_ahead == 0, [&](auto known) {
    using K = decltype(known);
    if (job.partition.channels_last) return SumGradientColumns<T, K>(job, item);
    SumPlanes<PlaneGradientMoments<T, K>, GradientInputs<T, K>>(job, item, [&](const Run& run) {
      const uint8_t* bits = BitsInPlace(job.problem, job.partition, run, job.arrays.activation_bits);
      return GradientInputs<T, K>(job, run, bits, job.sums_ahead);
    });
  });
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_GRADIENT_MOMENTS_H_
