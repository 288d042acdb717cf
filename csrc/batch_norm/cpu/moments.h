// The moments of x, of the columns or planes of an item: sums about a shift near the mean, which chains join to a mean
// and m2 in double.

#ifndef TFOPS_BATCH_NORM_CPU_MOMENTS_H_
#define TFOPS_BATCH_NORM_CPU_MOMENTS_H_

#include "csrc/batch_norm/cpu/coefficients.h"
#include "csrc/batch_norm/cpu/sums.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// A chain has no more than so many times the elements that its shift is the mean of. If these were outliers, their
// squares still count for enough in m2 that what the others' distance from them loses to rounding is little of it.
constexpr int64_t kReach = 3;

// Each join of planes' chains rounds the mean by half an ulp of double: noticeable where the data are double too, whose
// own chains may be longer.
template <typename P>
constexpr int64_t kMomentsChainRows = sizeof(P) == 4 ? kChainRows : 4 * kChainRows;

// x - shift and its square; shifts are the coefficients' means.
template <typename T>
struct MomentsInputs {
  using P = Param<T>;
  using Input = Vec<P>;
  static constexpr int kL = kLanes<P>;

  const T* x;

  TFOPS_INLINE void FetchRow(int64_t) const {}
  TFOPS_INLINE void Fetch(int64_t) const {}
  template <bool kPartial, typename C>
  TFOPS_INLINE Vec<P> Read(const C& c, int64_t column, int64_t i, int64_t n) const {
    const Vec<P> d = LoadLanes<kPartial>(x + i, n) - c.Get(kMean, column);
    return kPartial ? KeepFirst<P>(d, n) : d;
  }
  template <int kCount>
  TFOPS_INLINE void Finish(Vec<P> (&)[kCount]) const {}
  static TFOPS_INLINE void Add(Vec<P> d, Vec<P>* sum, Vec<P>* squares) {
    *sum += d;
    *squares += d * d;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The moments of columns.

// The weights by which `added` elements join `count` others, in Merge.
struct MergeWeights {
  double share;  // of the added ones in the whole
  double cross;  // what the square of the difference of means counts for

  MergeWeights(double count, double added) : share(added / (count + added)), cross(count * share) {}
};

// A first estimate of each column's mean. Summed about the first row, it errs by little of the columns' deviation.
template <bool kPartial, typename T>
TFOPS_INLINE Vec<Param<T>> MeanOfRows(const T* x, int64_t stride, int64_t rows, int64_t n) {
  using P = Param<T>;
  const Vec<P> first = LoadLanes<kPartial>(x, n);
  Vec<P> sum{};
  for (int64_t r = 1; r < rows; ++r) sum += LoadLanes<kPartial>(x + r * stride, n) - first;
  return first + sum / static_cast<P>(rows);
}

template <typename T>
class ColumnMoments {
  using P = Param<T>;

 public:
  static constexpr int kRowsAtOnce = kRowUnit;

  // The moments go to mean and m2.
  ColumnMoments(double* mean, double* m2, int64_t columns) : mean_(mean), m2_(m2) {
    for (int64_t j = 0; j < columns; ++j) mean[j] = m2[j] = 0;
  }
  int64_t count() const { return count_; }

  // Adds a chain of steps * kRows rows, `step` elements from one step to the next and `apart` elements within one.
  template <int kRows>
  __attribute__((noinline)) void AddChain(const T* x, int64_t steps, int64_t step, int64_t apart, int64_t columns) {
    const int64_t stride = kRows > 1 ? apart : step, rows_of_mean = kRows > 1 ? kRows : steps;
    ForEachVector<P>(columns, [&](auto partial, int64_t j, int64_t n) {
      if (count_ == 0) {
        Store(shift_ + j, FiniteOrZero(MeanOfRows<decltype(partial)::value>(x + j, stride, rows_of_mean, n)));
      }
      Store(sums_.first + j, Vec<P>{});
      Store(sums_.second + j, Vec<P>{});
    });
    for (int64_t j = 0; count_ > 0 && j < columns; ++j) shift_[j] = FiniteOrZero(static_cast<P>(mean_[j]));
    const ColumnCoefficients<P> shifts({shift_}, 0);
    for (int64_t i = 0; i < steps; ++i) {
      MomentsInputs<T> rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = {x + i * step + r * apart};
      AddRows(rows, shifts, columns, &sums_);
    }
    Merge(steps * kRows, columns);
  }

 private:
  // Merges the chain of `added` rows into those before it.
  void Merge(int64_t added, int64_t columns) {
    const double inverse = 1.0 / static_cast<double>(added);
    const MergeWeights weights(static_cast<double>(count_), static_cast<double>(added));
    const bool is_first = count_ == 0;  // then there is no delta, whose square might overflow
    double* __restrict mean = mean_;
    double* __restrict m2 = m2_;
    for (int64_t j = 0; j < columns; ++j) {
      const double sum = static_cast<double>(sums_.first[j]);
      const double off = sum * inverse;  // as in MomentsOfShifted
      const double chain_mean = static_cast<double>(shift_[j]) + off;
      const double difference = static_cast<double>(sums_.second[j]) - sum * off;
      const double chain_m2 = difference < 0 ? 0 : difference;
      const double delta = chain_mean - mean[j];
      const double merged_mean = MergedMean(mean[j], chain_mean, delta * weights.share);
      const double merged_m2 = m2[j] + (chain_m2 + delta * delta * weights.cross);
      mean[j] = is_first ? chain_mean : merged_mean;
      m2[j] = is_first ? chain_m2 : merged_m2;
    }
    count_ += added;
  }

  double* mean_;
  double* m2_;
  int64_t count_ = 0;
  alignas(64) P shift_[kMaxColumns];
  ColumnSums<P> sums_;
};

template <typename T>
void PartialColumnMoments(const ForwardJob& job, int64_t item) {
  constexpr int kRowsAtOnce = ColumnMoments<T>::kRowsAtOnce;
  constexpr int64_t kFirstSteps = 4, kMostSteps = kChainRows - kRowsAtOnce;
  const Partition& partition = job.partition;
  const T* x = static_cast<const T*>(job.arrays.x);
  const int64_t begin = partition.ColumnBegin(item), slot = partition.Slot(item, begin);
  ColumnMoments<T> moments(job.partials.first + slot, job.partials.second + slot, partition.ColumnEnd(item) - begin);
  // A chain's end takes as long as three steps, so chains grow with what their shift is the mean of: a step, at first.
  const auto steps_of = [](int64_t count) {
    return count == 0 ? kFirstSteps : Min(kMostSteps, kReach * count / kRowsAtOnce);
  };
  const auto add = [&](auto rows_at_once, int64_t row, int64_t steps, int64_t apart, int64_t from, int64_t to) {
    moments.template AddChain<decltype(rows_at_once)::value>(x + row * partition.columns + from, steps,
                                                             partition.columns, apart * partition.columns, to - from);
  };
  ForEachColumnChain<kRowsAtOnce>(partition, item, steps_of, add);
}

// ---------------------------------------------------------------------------------------------------------------------
// The moments of planes.

// The moments of one channel, run after run.
template <typename T>
class PlaneMoments {
  using P = Param<T>;

 public:
  void Begin() {
    count_ = additions_ = 0;
    total_ = {0, 0, 0};
  }

  // Adds the elements of kRuns runs of this length.
  template <int kRuns>
  TFOPS_INLINE void Add(const MomentsInputs<T> (&runs)[kRuns], const Coefficients&, int64_t, int64_t length) {
    constexpr int64_t kPiece = kChainElements<kRuns, kMomentsChainRows<P>, P>;
    for (int64_t begin = 0; begin < length; begin += kPiece) {
      const int64_t end = Min(begin + kPiece, length);
      const int64_t n = (end - begin) * kRuns;
      const int64_t additions = AdditionsOf<kRuns, P>(end - begin);
      if (additions_ + additions > kMomentsChainRows<P> || count_ + n > most_) Flush();
      if (count_ == 0) Start(runs, begin, end);
      AddPiece(runs, ChannelCoefficients<P>(shift_), begin, end, &sums_);
      count_ += n;
      additions_ += additions;
    }
  }

  void Finish(const Partials& partials, int64_t slot) {
    Flush();
    partials.first[slot] = total_.mean;
    partials.second[slot] = total_.m2;
    if (partials.count) partials.count[slot] = total_.count;
  }

 private:
  // The shift is the mean so far, or that of the elements at hand, if they are many more.
  template <int kRuns>
  void Start(const MomentsInputs<T> (&runs)[kRuns], int64_t begin, int64_t end) {
    constexpr int kL = kLanes<P>;
    const int64_t n = (end - begin) * kRuns;
    int64_t known = static_cast<int64_t>(total_.count);
    P shift = static_cast<P>(total_.mean);
    if (n > kReach * known) {
      known = n;
      const ChannelCoefficients<P> first(Splat(LoadFirst(runs[0].x + begin, 1)[0]));
      Vec<P> sum{};
      for (int64_t i = begin; i < end; i += kL) {
        for (const MomentsInputs<T>& run : runs) {
          sum +=
              i + kL <= end ? run.template Read<false>(first, i, i, kL) : run.template Read<true>(first, i, i, end - i);
        }
      }
      shift = static_cast<P>(static_cast<double>(first.Get(kMean, 0)[0]) + SumOfLanes<P>(sum) / static_cast<double>(n));
    }
    most_ = kReach * known;
    shift_ = Splat(FiniteOrZero(shift));
    sums_.Clear();
  }

  void Flush() {
    if (count_ == 0) return;
    const double count = static_cast<double>(count_), shift = static_cast<double>(shift_[0]);
    const double sum = PlaneSums<P>::Total(sums_.first), squares = PlaneSums<P>::Total(sums_.second);
    total_ = Merge<double>(total_, MomentsOfShifted<double>(count, shift, sum, squares));
    count_ = additions_ = 0;
  }

  Vec<P> shift_;
  PlaneSums<P> sums_;
  int64_t count_;      // of the open chain's elements
  int64_t most_;       // that it may have
  int64_t additions_;  // to one of its sums
  Moments<double> total_;
};

template <typename T>
void PartialMoments(const ForwardJob& job, int64_t item) {
  if (job.partition.channels_last) {
    PartialColumnMoments<T>(job, item);
  } else {
    const T* x = static_cast<const T*>(job.arrays.x);
    SumPlanes<PlaneMoments<T>, MomentsInputs<T>>(job, item,
                                                 [=](const Run& run) { return MomentsInputs<T>{x + run.offset}; });
  }
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_MOMENTS_H_
