// The moments of x: columns or planes, chain by chain, and what a channel's partial moments come to.

#ifndef TFOPS_BATCH_NORM_CPU_MOMENTS_PASS_H_
#define TFOPS_BATCH_NORM_CPU_MOMENTS_PASS_H_

#include "csrc/batch_norm/cpu/elements.h"
#include "csrc/batch_norm/cpu/runs.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

template <typename P>
TFOPS_INLINE void MergeMoments(int64_t count, double* mean, double* m2, int64_t n, P shift, P sum, P squares) {
  const Moments<double> added = MomentsOfShifted<double>(static_cast<double>(n), static_cast<double>(shift),
                                                         static_cast<double>(sum), static_cast<double>(squares));
  const Moments<double> merged = Merge<double>({static_cast<double>(count), *mean, *m2}, added);
  *mean = merged.mean;
  *m2 = merged.m2;
}

// A first estimate of each column's mean. Summed about the first row, it errs by little of the columns' deviation.
template <typename T, int kVectors, bool kPartial>
TFOPS_INLINE void MeanOfRows(const T* x, int64_t stride, int64_t rows, int64_t columns, Param<T>* mean) {
  using P = Param<T>;
  constexpr int kL = kLanes<P>;
  for (int v = 0; v < kVectors; ++v) {
    const Vec<P> first = LoadLanes<kPartial>(x + v * kL, columns);
    Vec<P> sum{};
    for (int64_t r = 1; r < rows; ++r) sum += LoadLanes<kPartial>(x + r * stride + v * kL, columns) - first;
    Store(mean + v * kL, first + sum / static_cast<P>(rows));
  }
}

// Merges `rows` rows (a chain) of kVectors vectors of columns, `columns` of them if kPartial (one part-filled
// vector), into mean and m2 of the `count` rows before them. The shift is the mean so far, or a first estimate.
template <typename T, int kVectors, bool kPartial>
TFOPS_INLINE void MergeRows(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t count, double* mean,
                            double* m2) {
  using P = Param<T>;
  constexpr int kL = kLanes<P>;
  const int64_t n = kPartial ? columns : kVectors * kL;
  P shifts[kVectors * kL]{};
  if (count > 0) {
    for (int64_t i = 0; i < n; ++i) shifts[i] = static_cast<P>(mean[i]);
  } else {
    MeanOfRows<T, kVectors, kPartial>(x, stride, rows, columns, shifts);
  }
  Vec<P> shift[kVectors], sum[kVectors]{}, squares[kVectors]{};
  for (int v = 0; v < kVectors; ++v) shift[v] = Load(shifts + v * kL);
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const Vec<P> d = LoadLanes<kPartial>(x + r * stride + v * kL, columns) - shift[v];
      sum[v] += d;
      squares[v] += d * d;
    }
  }
  P sums[kVectors * kL], squares_of[kVectors * kL];
  for (int v = 0; v < kVectors; ++v) {
    Store(sums + v * kL, sum[v]);
    Store(squares_of + v * kL, squares[v]);
  }
  for (int64_t i = 0; i < n; ++i) MergeMoments(count, mean + i, m2 + i, rows, shifts[i], sums[i], squares_of[i]);
}

template <typename T>
void MergeTile(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t count, double* mean, double* m2) {
  constexpr int kL = kLanes<Param<T>>;
  int64_t j = 0;
  for (; j + kUnroll * kL <= columns; j += kUnroll * kL) {
    MergeRows<T, kUnroll, false>(x + j, stride, rows, columns, count, mean + j, m2 + j);
  }
  for (; j + kL <= columns; j += kL) MergeRows<T, 1, false>(x + j, stride, rows, columns, count, mean + j, m2 + j);
  if (j < columns) MergeRows<T, 1, true>(x + j, stride, rows, columns - j, count, mean + j, m2 + j);
}

template <typename T>
void ColumnMoments(const ForwardJob& job, int64_t item) {
  const Plan& plan = job.plan;
  const T* x = static_cast<const T*>(job.arrays.x);
  const int64_t chunk = plan.Chunk(item);
  const int64_t first = plan.ColumnBegin(item);
  const int64_t columns = plan.ColumnEnd(item) - first;
  double* mean = job.partials.first + chunk * plan.columns + first;
  double* m2 = job.partials.second + chunk * plan.columns + first;
  for (int64_t j = 0; j < columns; ++j) mean[j] = m2[j] = 0;
  const int64_t begin = plan.RowBegin(chunk);
  const int64_t end = plan.RowEnd(chunk);
  constexpr int64_t kRows = kMomentsChainRows<Param<T>>;
  for (int64_t r = begin; r < end; r += kRows) {
    MergeTile(x + r * plan.columns + first, plan.columns, Min(kRows, end - r), columns, r - begin, mean, m2);
  }
  if (plan.HasTail(chunk)) {
    MergeTile(x + plan.rows * plan.columns, plan.columns, 1, plan.tail, end - begin, mean, m2);
  }
}

// Sums about a shift along contiguous elements of one channel, run after run, until a lane's chain is long enough.
template <typename T>
class MomentsChain {
  using P = Param<T>;
  static constexpr int kL = kLanes<P>;

 public:
  void Add(const T* x, int64_t n) {
    while (n > 0) {
      if (count_ == 0) Start(x, n);
      const int64_t taken = Min(n, kElements - count_);
      int64_t i = 0;
      for (; i + kUnroll * kL <= taken; i += kUnroll * kL) {
        for (int v = 0; v < kUnroll; ++v) Accumulate(v, Load(x + i + v * kL) - shift_);
      }
      for (; i + kL <= taken; i += kL) Accumulate(0, Load(x + i) - shift_);
      if (i < taken) Accumulate(0, KeepFirst<P>(LoadFirst(x + i, taken - i) - shift_, taken - i));
      count_ += taken;
      x += taken;
      n -= taken;
      if (count_ == kElements) Flush();
    }
  }

  Moments<double> Finish() {
    if (count_ > 0) Flush();
    return total_;
  }

 private:
  static constexpr int64_t kElements = kMomentsChainRows<P> * kUnroll * kL;

  // The shift is the mean so far; before there is one, a first estimate: that of the elements at hand.
  void Start(const T* x, int64_t n) {
    P shift = static_cast<P>(total_.mean);
    if (total_.count == 0) {
      const int64_t taken = Min(n, kElements);
      const Vec<P> first = Splat(LoadFirst(x, 1)[0]);
      Vec<P> sum{};
      int64_t i = 0;
      for (; i + kL <= taken; i += kL) sum += Load(x + i) - first;
      if (i < taken) sum += KeepFirst<P>(LoadFirst(x + i, taken - i) - first, taken - i);
      shift = static_cast<P>(static_cast<double>(first[0]) + SumOfLanes<P>(sum) / static_cast<double>(taken));
    }
    shift_ = Splat(shift);
    for (int v = 0; v < kUnroll; ++v) sum_[v] = squares_[v] = Vec<P>{};
  }

  TFOPS_INLINE void Accumulate(int v, Vec<P> d) {
    sum_[v] += d;
    squares_[v] += d * d;
  }

  void Flush() {
    const Vec<P> sum = (sum_[0] + sum_[1]) + (sum_[2] + sum_[3]);
    const Vec<P> squares = (squares_[0] + squares_[1]) + (squares_[2] + squares_[3]);
    total_ = Merge<double>(total_, MomentsOfShifted<double>(static_cast<double>(count_), static_cast<double>(shift_[0]),
                                                            SumOfLanes<P>(sum), SumOfLanes<P>(squares)));
    count_ = 0;
  }

  Vec<P> shift_{};
  Vec<P> sum_[kUnroll]{};
  Vec<P> squares_[kUnroll]{};
  int64_t count_ = 0;
  Moments<double> total_{0, 0, 0};
};
static_assert(kUnroll == 4, "Flush adds four");

template <typename T>
void PlaneMoments(const ForwardJob& job, int64_t item) {
  const Plan& plan = job.plan;
  const T* x = static_cast<const T*>(job.arrays.x);
  const int64_t chunk = plan.Chunk(item);
  for (int64_t c = plan.ColumnBegin(item); c < plan.ColumnEnd(item); ++c) {
    MomentsChain<T> chain;
    for (int64_t r = plan.RowBegin(chunk); r < plan.RowEnd(chunk); ++r) {
      const Run run = SegmentRun(job.problem, plan, r, c);
      chain.Add(x + run.offset, run.length);
    }
    const Moments<double> moments = chain.Finish();
    job.partials.first[chunk * plan.columns + c] = moments.mean;
    job.partials.second[chunk * plan.columns + c] = moments.m2;
  }
}

template <typename T>
void MomentsItem(const ForwardJob& job, int64_t item) {
  if (job.plan.channels_last) {
    ColumnMoments<T>(job, item);
  } else {
    PlaneMoments<T>(job, item);
  }
}

// Writes coefficient c of every column of channel c.
template <typename Job, typename P>
TFOPS_INLINE void Spread(const Job& job, void* coefficients, int64_t c, P value) {
  for (int64_t f = 0; f < job.plan.fold; ++f) static_cast<P*>(coefficients)[f * job.problem.channels + c] = value;
}

// Calls merge(slot, n) for each slot of partials that a channel has, n being its number of elements: chunk by chunk,
// fold by fold. Slot s of channel c lies at s + c.
template <typename Body>
TFOPS_INLINE void ForEachPartial(const Problem& problem, const Plan& plan, Body merge) {
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    for (int64_t f = 0; f < plan.fold; ++f) {
      int64_t n = plan.RowEnd(chunk) - plan.RowBegin(chunk);
      if (!plan.channels_last) {
        n = ElementsBefore(problem, plan, plan.RowEnd(chunk)) - ElementsBefore(problem, plan, plan.RowBegin(chunk));
      } else if (plan.HasTail(chunk) && f * problem.channels < plan.tail) {
        ++n;
      }
      merge(chunk * plan.columns + f * problem.channels, n);
    }
  }
}

template <typename T>
void FinishStatisticsOf(const ForwardJob& job, int64_t begin, int64_t end) {
  using P = Param<T>;
  const Problem& problem = job.problem;
  const ForwardArrays& arrays = job.arrays;
  double* mean = job.partials.first;
  double* m2 = job.partials.second;
  double count = 0;
  if (problem.training) {
    ForEachPartial(problem, job.plan, [&](int64_t slot, int64_t n) {
      const double added = static_cast<double>(n);
      if (slot > 0) {
        for (int64_t c = begin; c < end; ++c) {
          const Moments<double> merged = Merge<double>({count, mean[c], m2[c]}, {added, mean[slot + c], m2[slot + c]});
          mean[c] = merged.mean;
          m2[c] = merged.m2;
        }
      }
      count += added;
    });
  }
  for (int64_t c = begin; c < end; ++c) {
    P center;
    double inv_std;
    if (problem.training) {
      const Moments<double> moments = count > 0 ? Moments<double>{count, mean[c], m2[c]} : Moments<double>{0, 0, 0};
      FinishStatistics<P>(problem, arrays, moments, c);
      center = static_cast<const P*>(arrays.saved_mean)[c];
      inv_std = static_cast<double>(static_cast<const P*>(arrays.saved_inv_std)[c]);
    } else {
      center = static_cast<const P*>(arrays.mean)[c];
      inv_std = InverseStd(static_cast<const P*>(arrays.variance)[c], problem.epsilon);
    }
    Spread(job, job.coefficients.mean, c, center);
    Spread(job, job.coefficients.slope, c, Slope<P>(static_cast<const P*>(arrays.scale)[c], inv_std));
    Spread(job, job.coefficients.offset, c, static_cast<const P*>(arrays.offset)[c]);
  }
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_MOMENTS_PASS_H_
