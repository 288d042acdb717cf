// The phases by themselves where only some elements count, as a Mask says: their moments, and dx.
//
// Their partitions are those of the other passes, but for one thing: rows that were folded are seen one by one.

#ifndef TFOPS_BATCH_NORM_CPU_KEPT_PASS_H_
#define TFOPS_BATCH_NORM_CPU_KEPT_PASS_H_

#include <type_traits>

#include "csrc/batch_norm/cpu/gradient_pass.h"
#include "csrc/batch_norm/cpu/moments_pass.h"
#include "csrc/batch_norm/cpu/runs.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// Calls body(begin, length, is_counted) for the stretches of elements offset to offset + length that are alike; begin
// counts from the offset.
template <typename Body>
TFOPS_INLINE void ForEachStretch(const Mask& mask, int64_t offset, int64_t length, Body body) {
  const uint8_t* flags = mask.flags + offset / mask.length;
  int64_t left = mask.length - offset % mask.length;  // of the first flag's run
  for (int64_t begin = 0; begin < length;) {
    const bool is_counted = *flags != 0;
    int64_t end = begin;
    do {
      end += left;
      left = mask.length;
      ++flags;
    } while (end < length && (*flags != 0) == is_counted);
    body(begin, Min(end, length) - begin, is_counted);
    begin = end;
  }
}

// Rows of x as they are, not folded, that an item has.
struct UnfoldedRows {
  int64_t begin;
  int64_t end;
  int64_t column_begin;
  int64_t column_end;
};

TFOPS_INLINE UnfoldedRows RowsOfItem(const Problem& problem, const Partition& partition, int64_t item) {
  const int64_t chunk = partition.Chunk(item);
  const int64_t tail = partition.HasTail(chunk) ? partition.tail / problem.channels : 0;
  const int64_t begin = partition.RowBegin(chunk) * partition.fold,
                end = partition.RowEnd(chunk) * partition.fold + tail;
  if (partition.fold > 1) return {begin, end, 0, problem.channels};
  return {begin, end, partition.ColumnBegin(item), partition.ColumnEnd(item)};
}

// Channels-last, rows that count as a whole: they are gathered in the cache, some columns of some rows at a time, and
// go through the same chains as rows that lie side by side.
template <typename T>
void MaskedRowMoments(const MomentsJob& job, int64_t item) {
  constexpr int kRowsAtOnce = ColumnChain<T>::kRowsAtOnce;
  constexpr int64_t kRows = kMomentsChainRows<Param<T>>;
  constexpr int64_t kColumns = (32 << 10) / (kRows * static_cast<int64_t>(sizeof(T)));
  const Problem& problem = job.forward.problem;
  const Partition& partition = job.forward.partition;
  const UnfoldedRows rows = RowsOfItem(problem, partition, item);
  const uint8_t* flags = job.arrays.mask.flags;
  const int64_t slot = partition.Chunk(item) * partition.columns;
  ColumnChain<T> chain;
  alignas(64) T gathered[kRows * kColumns];
  for (int64_t begin = rows.column_begin; begin < rows.column_end; begin += kColumns) {
    const int64_t columns = Min(kColumns, rows.column_end - begin);
    double* mean = job.forward.partials.first + slot + begin;
    double* m2 = job.forward.partials.second + slot + begin;
    for (int64_t j = 0; j < columns; ++j) mean[j] = m2[j] = 0;
    int64_t count = 0, waiting = 0;
    const auto merge = [&](auto rows_at_once, const T* x, int64_t steps) {
      constexpr int kAtOnce = decltype(rows_at_once)::value;
      chain.template Merge<kAtOnce>(x, steps, kAtOnce * columns, columns, columns, count, mean, m2);
      count += steps * kAtOnce;
    };
    const auto merge_all = [&] {
      const int64_t steps = waiting / kRowsAtOnce, rest = waiting % kRowsAtOnce;
      if (steps > 0) merge(std::integral_constant<int, kRowsAtOnce>(), gathered, steps);
      if (rest > 0) merge(std::integral_constant<int, 1>(), gathered + (waiting - rest) * columns, rest);
      waiting = 0;
    };
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      if (!flags[r]) continue;
      const T* x = static_cast<const T*>(job.arrays.x) + r * problem.channels + begin;
      std::memcpy(gathered + waiting * columns, x, static_cast<size_t>(columns) * sizeof(T));
      if (++waiting == kRows) merge_all();
    }
    merge_all();
    for (int64_t j = 0; j < columns; ++j) job.counts[slot + begin + j] = static_cast<double>(count);
  }
}

// Channels-last, each element by itself.
template <typename T>
void MaskedElementMoments(const MomentsJob& job, int64_t item) {
  const Problem& problem = job.forward.problem;
  const UnfoldedRows rows = RowsOfItem(problem, job.forward.partition, item);
  const uint8_t* flags = job.arrays.mask.flags;
  const int64_t slot = job.forward.partition.Chunk(item) * job.forward.partition.columns;
  for (int64_t c = rows.column_begin; c < rows.column_end; ++c) {
    Moments<double> total{0, 0, 0};
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t i = r * problem.channels + c;
      if (!flags[i]) continue;
      const double x = static_cast<double>(LoadFirst(static_cast<const T*>(job.arrays.x) + i, 1)[0]);
      total = Merge<double>(total, {1, x, 0});
    }
    job.counts[slot + c] = total.count;
    job.forward.partials.first[slot + c] = total.mean;
    job.forward.partials.second[slot + c] = total.m2;
  }
}

// Channels-first: stretches of planes.
template <typename T>
void MaskedPlaneMoments(const MomentsJob& job, int64_t item) {
  const Partition& partition = job.forward.partition;
  const T* x = static_cast<const T*>(job.arrays.x);
  const int64_t chunk = partition.Chunk(item);
  ForEachGroup(partition, item, [&](int64_t begin, int64_t end) {
    MomentsChain<T> chains[kMaxGroup];
    for (int64_t c = begin; c < end; ++c) chains[c - begin].Begin();
    for (int64_t r = partition.RowBegin(chunk); r < partition.RowEnd(chunk); ++r) {
      for (int64_t c = begin; c < end; ++c) {
        const Run run = SegmentRun(job.forward.problem, partition, r, c);
        ForEachStretch(job.arrays.mask, run.offset, run.length, [&](int64_t first, int64_t length, bool is_counted) {
          const T* const start[] = {x + run.offset + first};
          if (is_counted) chains[c - begin].Add(start, length);
        });
      }
    }
    for (int64_t c = begin; c < end; ++c) {
      const Moments<double> moments = chains[c - begin].Finish();
      job.counts[chunk * partition.columns + c] = moments.count;
      job.forward.partials.first[chunk * partition.columns + c] = moments.mean;
      job.forward.partials.second[chunk * partition.columns + c] = moments.m2;
    }
  });
}

template <typename T>
void MaskedMomentsItem(const MomentsJob& job, int64_t item) {
  if (!job.forward.partition.channels_last) {
    MaskedPlaneMoments<T>(job, item);
  } else if (job.arrays.mask.length == job.forward.problem.channels) {
    MaskedRowMoments<T>(job, item);
  } else {
    MaskedElementMoments<T>(job, item);
  }
}

// Writes what the partial moments of channels `begin` to `end` come to, of all elements or of those that count.
template <typename T>
void FinishMomentsOf(const MomentsJob& job, int64_t begin, int64_t end) {
  using P = Param<T>;
  const bool counted = job.arrays.mask.flags != nullptr;
  double* __restrict mean = job.forward.partials.first;
  double* __restrict m2 = job.forward.partials.second;
  double* __restrict count = job.counts;
  const auto merge = [&](int64_t slot, double all) {
    for (int64_t c = begin; c < end; ++c) {
      const double added = counted ? count[slot + c] : all;
      const bool both = count[c] > 0 && added > 0;  // else no delta, whose square might overflow
      const double share = added > 0 ? added / (count[c] + added) : 0;
      const double delta = both ? mean[slot + c] - mean[c] : 0;
      mean[c] = count[c] > 0 ? MergedMean(mean[c], mean[slot + c], delta * share) : mean[slot + c];
      m2[c] += m2[slot + c] + delta * delta * (count[c] * share);
      count[c] += added;
    }
  };
  bool first = true;
  ForEachPartial(job.forward.problem, job.forward.partition, [&](int64_t slot, int64_t n) {
    // Folded rows were seen one by one.
    if (counted && slot % job.forward.partition.columns != 0) return;
    if (!first) return merge(slot, static_cast<double>(n));
    first = false;
    if (counted) return;
    for (int64_t c = begin; c < end; ++c) count[c] = static_cast<double>(n);
  });
  for (int64_t c = begin; c < end; ++c) {
    const double n = first ? 0 : count[c];
    static_cast<P*>(job.arrays.count)[c] = static_cast<P>(n);
    static_cast<P*>(job.arrays.mean)[c] = static_cast<P>(n > 0 ? mean[c] : 0);
    static_cast<P*>(job.arrays.variance)[c] = static_cast<P>(n > 0 ? m2[c] / n : 0);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// dx = dz * slope, and where elements count, + (x - mean) * tilt + shift

template <typename T>
void SpreadStatisticsGradientOf(const BackwardJob& job, const StatisticsGradient& statistics, int64_t begin,
                                int64_t end) {
  SpreadVector<Param<T>>(job, job.coefficients.tilt, statistics.tilt, begin, end);
  SpreadVector<Param<T>>(job, job.coefficients.shift, statistics.shift, begin, end);
}

template <typename T>
void MaskedGradientNormalizeItem(const BackwardJob& job, const Mask& mask, int64_t item) {
  using P = Param<T>;
  WithActivation(job.problem.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    ForEachRun(job.problem, job.partition, item, [&](const Run& run) {
      ForEachStretch(mask, run.offset, run.length, [&](int64_t first, int64_t length, bool is_counted) {
        Run stretch = run;
        stretch.offset += first;
        stretch.length = length;
        const auto arrays = ArraysOfRun<T, AnyArrays>(job, stretch, nullptr, job.dx_ahead);
        if (job.partition.channels_last) {
          const ColumnCoefficients<P> coefficients(job.coefficients, run.column + first);
          GradientNormalizeAnyRun<kActivation>(arrays, coefficients, is_counted);
        } else {
          GradientNormalizeAnyRun<kActivation>(arrays, ChannelCoefficients<P>(job.coefficients, run.column),
                                               is_counted);
        }
      });
    });
  });
  StreamFence();
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_KEPT_PASS_H_
