// The moments of x: columns or planes, chain by chain, and what a channel's partial moments come to.

#ifndef TFOPS_BATCH_NORM_CPU_MOMENTS_PASS_H_
#define TFOPS_BATCH_NORM_CPU_MOMENTS_PASS_H_

#include <type_traits>

#include "csrc/batch_norm/cpu/elements.h"
#include "csrc/batch_norm/cpu/runs.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// A chain has no more than so many times the elements that its shift is the mean of. If these were outliers, their
// squares still count for enough in m2 that what the others' distance from them loses to rounding is little of it.
constexpr int64_t kReach = 3;

// The weights by which `added` elements join `count` others, in Merge.
struct MergeWeights {
  double share;  // of the added ones in the whole
  double cross;  // what the square of the difference of means counts for

  MergeWeights(double count, double added) : share(added / (count + added)), cross(count * share) {}
};

// A running mean and m2 for each lane, in memory: all lanes, or the first n.
template <typename P, bool kPartial>
struct RunningMoments {
  double* mean;
  double* m2;
  int64_t n;

  TFOPS_INLINE Wide<P> Take(const double* p) const {
    if constexpr (!kPartial) return LoadWide<P>(p);
    double buffer[kLanes<P>] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return LoadWide<P>(buffer);
  }
  TFOPS_INLINE void Put(double* p, const Wide<P>& w) const {
    if constexpr (!kPartial) return StoreWide<P>(p, w);
    double buffer[kLanes<P>];
    StoreWide<P>(buffer, w);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
  }

  TFOPS_INLINE Vec<P> Shift() const { return Narrow(Take(mean)); }

  // Merges a chain of `added` rows, from sums about `shift`, into the `count` rows before it.
  TFOPS_INLINE void MergeChain(int64_t count, int64_t added, Vec<P> shift, Vec<P> sum, Vec<P> squares) const {
    const double inverse = 1.0 / static_cast<double>(added);
    const MergeWeights weights(static_cast<double>(count), static_cast<double>(added));
    const Wide<P> shifts = Widen(shift), sums = Widen(sum), all_squares = Widen(squares);
    Wide<P> old_mean = Take(mean), old_m2 = Take(m2);
    for (int k = 0; k < Wide<P>::kParts; ++k) {
      const Vec<double> off = sums.part[k] * inverse;  // MomentsOfShifted
      const Vec<double> chain_mean = shifts.part[k] + off;
      Vec<double> chain_m2 = all_squares.part[k] - sums.part[k] * off;
      chain_m2 = chain_m2 < Vec<double>{} ? Vec<double>{} : chain_m2;
      if (count == 0) {  // no delta, whose square might overflow
        old_mean.part[k] = chain_mean;
        old_m2.part[k] = chain_m2;
      } else {
        const Vec<double> delta = chain_mean - old_mean.part[k];
        old_mean.part[k] = MergedMean(old_mean.part[k], chain_mean, delta * weights.share);
        old_m2.part[k] += chain_m2 + delta * delta * weights.cross;
      }
    }
    Put(mean, old_mean);
    Put(m2, old_m2);
  }
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

// The sums of a chain of rows about a shift, for each column. They stay in the first two caches, and kRowsAtOnce
// rows pass through them at a time. These are not neighbours, but lie a part of the chunk apart, so that memory is read
// in as many streams, each of them straight ahead: prefetching wants whole pages, and rows are often less.
template <typename T>
class ColumnChain {
  using P = Param<T>;

 public:
  static constexpr int kRowsAtOnce = kRowUnit;

  // Merges steps * kRows rows, `step` elements from one step to the next and `apart` elements within one, into mean and
  // m2 of the `count` rows before them.
  template <int kRows>
  void Merge(const T* x, int64_t steps, int64_t step, int64_t apart, int64_t columns, int64_t count, double* mean,
             double* m2) {
    ForEachVector<P>(columns, [&](auto partial, int64_t j, int64_t n) {
      constexpr bool kPartial = decltype(partial)::value;
      const RunningMoments<P, kPartial> running{mean + j, m2 + j, n};
      const Vec<P> near = count > 0   ? running.Shift()
                          : kRows > 1 ? MeanOfRows<kPartial>(x + j, apart, kRows, n)
                                      : MeanOfRows<kPartial>(x + j, step, steps, n);
      Store(shift_ + j, FiniteOrZero(near));
      Store(sum_ + j, Vec<P>{});
      Store(squares_ + j, Vec<P>{});
    });
    for (int64_t i = 0; i < steps; ++i) Add<kRows>(x + i * step, apart, columns);
    ForEachVector<P>(columns, [&](auto partial, int64_t j, int64_t n) {
      const RunningMoments<P, decltype(partial)::value> running{mean + j, m2 + j, n};
      running.MergeChain(count, steps * kRows, Load(shift_ + j), Load(sum_ + j), Load(squares_ + j));
    });
  }

 private:
  template <int kRows>
  void Add(const T* x, int64_t apart, int64_t columns) {
    ForEachVector<P>(columns, [&](auto partial, int64_t j, int64_t n) {
      const Vec<P> shift = Load(shift_ + j);
      Vec<P> sum{}, squares{};  // of these rows first: shorter chains round less
      for (int r = 0; r < kRows; ++r) {
        const Vec<P> d = LoadLanes<decltype(partial)::value>(x + r * apart + j, n) - shift;
        sum += d;
        squares += d * d;
      }
      Store(sum_ + j, Load(sum_ + j) + sum);
      Store(squares_ + j, Load(squares_ + j) + squares);
    });
  }

  alignas(64) P shift_[kMaxColumns];
  alignas(64) P sum_[kMaxColumns];
  alignas(64) P squares_[kMaxColumns];
};

template <typename T>
void ColumnMoments(const ForwardJob& job, int64_t item) {
  const Partition& partition = job.partition;
  const T* x = static_cast<const T*>(job.arrays.x);
  const int64_t chunk = partition.Chunk(item);
  const int64_t first = partition.ColumnBegin(item);
  const int64_t columns = partition.ColumnEnd(item) - first;
  double* mean = job.partials.first + chunk * partition.columns + first;
  double* m2 = job.partials.second + chunk * partition.columns + first;
  for (int64_t j = 0; j < columns; ++j) mean[j] = m2[j] = 0;

  ColumnChain<T> chain;
  int64_t count = 0;
  // A chain: steps * kRows rows from row r on, which are `apart` rows apart within a step; the first n columns.
  const auto merge = [&](auto rows_at_once, int64_t r, int64_t steps, int64_t apart, int64_t n) {
    constexpr int kRows = decltype(rows_at_once)::value;
    chain.template Merge<kRows>(x + r * partition.columns + first, steps, partition.columns, apart * partition.columns,
                                n, count, mean, m2);
    count += steps * kRows;
  };
  // A chain's end takes as long as three steps, so chains grow with what their shift is the mean of: a step, at first.
  constexpr int kRowsAtOnce = ColumnChain<T>::kRowsAtOnce;
  constexpr int64_t kFirstSteps = 4, kMostSteps = kChainRows - kRowsAtOnce;
  const int64_t begin = partition.RowBegin(chunk);
  const int64_t end = partition.RowEnd(chunk);
  const int64_t apart = (end - begin) / kRowsAtOnce;
  for (int64_t i = 0; i < apart;) {
    const int64_t most = count == 0 ? kFirstSteps : Min(kMostSteps, kReach * count / kRowsAtOnce);
    const int64_t steps = Min(most, apart - i);
    merge(std::integral_constant<int, kRowsAtOnce>(), begin + i, steps, apart, columns);
    i += steps;
  }
  const int64_t rest = begin + apart * kRowsAtOnce;
  if (rest < end) merge(std::integral_constant<int, 1>(), rest, end - rest, 0, columns);
  if (partition.HasTail(chunk)) merge(std::integral_constant<int, 1>(), partition.rows, 1, 0, partition.tail);
}

// Sums about a shift along the elements of one channel, run after run, until a chain is long enough.
//
// Begin comes first. (A constructor in its place would run for all of kMaxGroup chains, however few a group has.)
template <typename T>
class MomentsChain {
  using P = Param<T>;

 public:
  void Begin() {
    count_ = additions_ = 0;
    total_ = {0, 0, 0};
  }

  // Adds the elements of kRuns runs of this length, which begin at x[0], x[1], ...
  template <int kRuns>
  TFOPS_INLINE void Add(const T* const (&x)[kRuns], int64_t length) {
    constexpr int64_t kPiece = kChainElements<kRuns, kMomentsChainRows<P>, P>;
    for (int64_t begin = 0; begin < length; begin += kPiece) {
      const int64_t end = Min(begin + kPiece, length);
      const int64_t n = (end - begin) * kRuns;
      const int64_t additions = AdditionsOf<kRuns, P>(end - begin);
      if (additions_ + additions > kMomentsChainRows<P> || count_ + n > most_) Flush();
      if (count_ == 0) Start(x, begin, end);
      ForEachVectorInTurn<kRuns, P>(begin, end, [&](auto partial, int v, int r, int64_t i, int64_t lanes) {
        Vec<P> d = LoadLanes<decltype(partial)::value>(x[r] + i, lanes) - shift_;
        if (decltype(partial)::value) d = KeepFirst<P>(d, lanes);
        sum_[v] += d;
        squares_[v] += d * d;
      });
      count_ += n;
      additions_ += additions;
    }
  }

  Moments<double> Finish() {
    Flush();
    return total_;
  }

 private:
  // The shift is the mean so far, or that of the elements at hand, if they are many more.
  template <int kRuns>
  void Start(const T* const (&x)[kRuns], int64_t begin, int64_t end) {
    const int64_t n = (end - begin) * kRuns;
    int64_t known = static_cast<int64_t>(total_.count);
    P shift = static_cast<P>(total_.mean);
    if (n > kReach * known) {
      known = n;
      const Vec<P> first = Splat(LoadFirst(x[0] + begin, 1)[0]);
      Vec<P> sum{};
      ForEachVectorInTurn<kRuns, P>(begin, end, [&](auto partial, int, int r, int64_t i, int64_t lanes) {
        const Vec<P> d = LoadLanes<decltype(partial)::value>(x[r] + i, lanes) - first;
        sum += decltype(partial)::value ? KeepFirst<P>(d, lanes) : d;
      });
      shift = static_cast<P>(static_cast<double>(first[0]) + SumOfLanes<P>(sum) / static_cast<double>(n));
    }
    most_ = kReach * known;
    shift_ = Splat(FiniteOrZero(shift));
    for (int v = 0; v < kUnroll; ++v) sum_[v] = squares_[v] = Vec<P>{};
  }

  void Flush() {
    if (count_ == 0) return;
    const double count = static_cast<double>(count_), shift = static_cast<double>(shift_[0]);
    total_ = Merge<double>(total_, MomentsOfShifted<double>(count, shift, SumOfAll<P>(sum_), SumOfAll<P>(squares_)));
    count_ = additions_ = 0;
  }

  Vec<P> shift_;
  Vec<P> sum_[kUnroll];
  Vec<P> squares_[kUnroll];
  int64_t count_;      // of the open chain's elements
  int64_t most_;       // that it may have
  int64_t additions_;  // to one of its sums
  Moments<double> total_;
};

template <typename T>
void PlaneMoments(const ForwardJob& job, int64_t item) {
  const Partition& partition = job.partition;
  const T* x = static_cast<const T*>(job.arrays.x);
  const int64_t chunk = partition.Chunk(item);
  ForEachGroup(partition, item, [&](int64_t begin, int64_t end) {
    MomentsChain<T> chains[kMaxGroup];
    for (int64_t c = begin; c < end; ++c) chains[c - begin].Begin();
    ForEachRuns(job.problem, partition, item, begin, end, [&](const auto& runs, int64_t c) {
      constexpr int kRuns = std::extent_v<std::remove_reference_t<decltype(runs)>>;
      const T* starts[kRuns];
      for (int k = 0; k < kRuns; ++k) starts[k] = x + runs[k].offset;
      chains[c - begin].Add(starts, runs[0].length);
    });
    for (int64_t c = begin; c < end; ++c) {
      const Moments<double> moments = chains[c - begin].Finish();
      job.partials.first[chunk * partition.columns + c] = moments.mean;
      job.partials.second[chunk * partition.columns + c] = moments.m2;
    }
  });
}

template <typename T>
void MomentsItem(const ForwardJob& job, int64_t item) {
  if (job.partition.channels_last) {
    ColumnMoments<T>(job, item);
  } else {
    PlaneMoments<T>(job, item);
  }
}

// Copies coefficients of channels begin to end from their first columns to their others.
template <typename P, typename Job>
TFOPS_INLINE void RepeatColumns(const Job& job, P* coefficients, int64_t begin, int64_t end) {
  const size_t bytes = static_cast<size_t>(end - begin) * sizeof(P);
  for (int64_t f = 1; f < job.partition.fold; ++f) {
    std::memcpy(coefficients + f * job.problem.channels + begin, coefficients + begin, bytes);
  }
}

// Writes a coefficient of every column of channels begin to end, value(c) being channel c's.
template <typename P, typename Job, typename Value>
TFOPS_INLINE void Spread(const Job& job, void* coefficients, int64_t begin, int64_t end, Value value) {
  P* first = static_cast<P*>(coefficients);
#pragma GCC ivdep
  for (int64_t c = begin; c < end; ++c) first[c] = value(c);
  RepeatColumns(job, first, begin, end);
}

// The same of a vector that has an element for each channel.
template <typename P, typename Job>
TFOPS_INLINE void SpreadVector(const Job& job, void* coefficients, const void* vector, int64_t begin, int64_t end) {
  Spread<P>(job, coefficients, begin, end, [=](int64_t c) { return static_cast<const P*>(vector)[c]; });
}

// Calls merge(slot, n) for each slot of partials that a channel has, n being its number of elements: chunk by chunk,
// fold by fold. Slot s of channel c lies at s + c.
template <typename Body>
TFOPS_INLINE void ForEachPartial(const Problem& problem, const Partition& partition, Body merge) {
  for (int64_t chunk = 0; chunk < partition.chunks; ++chunk) {
    for (int64_t f = 0; f < partition.fold; ++f) {
      int64_t n = partition.RowEnd(chunk) - partition.RowBegin(chunk);
      if (!partition.channels_last) {
        n = ElementsBefore(problem, partition, partition.RowEnd(chunk)) -
            ElementsBefore(problem, partition, partition.RowBegin(chunk));
      } else if (partition.HasTail(chunk) && f * problem.channels < partition.tail) {
        ++n;
      }
      merge(chunk * partition.columns + f * problem.channels, n);
    }
  }
}

// The mean of channel c as a plain average of its partial means: for infinities, which no deviation can tell.
template <typename Job>
double AverageOfPartials(const Job& job, int64_t c) {
  double count = 0, sum = 0;
  ForEachPartial(job.problem, job.partition, [&](int64_t slot, int64_t n) {
    if (n == 0) return;
    count += static_cast<double>(n);
    sum += static_cast<double>(n) * job.partials.first[slot + c];
  });
  return sum / count;
}

// Merges the partial moments of channels begin to end into their first. Returns their count. Means are merged by what
// they deviate from that first one: each step would round the mean itself, which may be large beside the deviations.
template <typename Job>
double MergePartials(const Job& job, int64_t begin, int64_t end) {
  constexpr int64_t kChannels = 256;
  double* __restrict mean = job.partials.first;
  double* __restrict m2 = job.partials.second;
  double count = 0;
  for (int64_t first = begin; first < end; first += kChannels) {
    const int64_t last = Min(first + kChannels, end);
    double deviation[kChannels] = {};
    count = 0;
    ForEachPartial(job.problem, job.partition, [&](int64_t slot, int64_t n) {
      const double added = static_cast<double>(n);
      if (count > 0 && added > 0) {
        const MergeWeights weights(count, added);
        for (int64_t c = first; c < last; ++c) {
          const double delta = (mean[slot + c] - mean[c]) - deviation[c - first];
          deviation[c - first] += delta * weights.share;
          m2[c] += m2[slot + c] + delta * delta * weights.cross;
        }
      }
      count += added;
    });
    int64_t strange = 0;  // how many are not finite
    for (int64_t c = first; c < last; ++c) {
      const double merged = mean[c] + deviation[c - first];
      deviation[c - first] = merged;
      strange += merged - merged != 0;
    }
    for (int64_t c = first; c < last && strange > 0; ++c) {
      double& merged = deviation[c - first];
      if (merged - merged != 0) merged = AverageOfPartials(job, c);
    }
    for (int64_t c = first; c < last; ++c) mean[c] = deviation[c - first];
  }
  return count;
}

// The vectors that training returns, of channels begin to end.
template <typename P>
void WriteStatistics(const ForwardJob& job, int64_t begin, int64_t end) {
  const Problem problem = job.problem;  // copies, which no store changes
  const ForwardArrays arrays = job.arrays;
  const double* mean = job.partials.first;
  const double* m2 = job.partials.second;
  const double count = MergePartials(job, begin, end);
  const auto moments = [=](int64_t c) {
    return count > 0 ? Moments<double>{count, mean[c], m2[c]} : Moments<double>{0, 0, 0};
  };
  // A loop each: in one, the compiler would not move all conditions out of it, and then not make vectors of it.
#pragma GCC ivdep
  for (int64_t c = begin; c < end; ++c) WriteRunningStatistics<P>(problem, arrays, moments(c), c);
#pragma GCC ivdep
  for (int64_t c = begin; c < end; ++c) WriteSavedStatistics<P>(problem, arrays, moments(c), c);
}

template <typename T>
void FinishStatisticsOf(const ForwardJob& job, int64_t begin, int64_t end) {
  using P = Param<T>;
  const ForwardArrays& arrays = job.arrays;
  const P* scale = static_cast<const P*>(arrays.scale);
  if (job.problem.training) {
    WriteStatistics<P>(job, begin, end);
    const P* inv_std = static_cast<const P*>(arrays.saved_inv_std);
    SpreadVector<P>(job, job.coefficients.mean, arrays.saved_mean, begin, end);
    Spread<P>(job, job.coefficients.slope, begin, end,
              [=](int64_t c) { return Slope<P>(scale[c], static_cast<double>(inv_std[c])); });
  } else {
    const P* variance = static_cast<const P*>(arrays.variance);
    const double epsilon = job.problem.epsilon;
    SpreadVector<P>(job, job.coefficients.mean, arrays.mean, begin, end);
    Spread<P>(job, job.coefficients.slope, begin, end,
              [=](int64_t c) { return Slope<P>(scale[c], InverseStd(static_cast<double>(variance[c]), epsilon)); });
  }
  SpreadVector<P>(job, job.coefficients.offset, arrays.offset, begin, end);
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_MOMENTS_PASS_H_
