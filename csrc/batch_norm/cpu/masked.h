// The phases by themselves where a mask says which elements count: their moments, and dx.
//
// Items are those of the other passes, but for one thing: rows that were folded are seen one by one.

#ifndef TFOPS_BATCH_NORM_CPU_MASKED_H_
#define TFOPS_BATCH_NORM_CPU_MASKED_H_

#include <cstring>
#include <type_traits>

#include "csrc/batch_norm/cpu/gradient_normalize.h"
#include "csrc/batch_norm/cpu/moments.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// Calls body(begin, length, counts) for the stretches of elements offset to offset + length that are alike; begin
// counts from the offset.
template <typename Body>
TFOPS_INLINE void ForEachStretch(const Mask& mask, int64_t offset, int64_t length, Body body) {
  const uint8_t* flags = mask.flags + offset / mask.length;
  int64_t left = mask.length - offset % mask.length;  // of the first flag's elements
  for (int64_t begin = 0; begin < length;) {
    const bool counts = *flags != 0;
    int64_t end = begin;
    do {
      end += left;
      left = mask.length;
      ++flags;
    } while (end < length && (*flags != 0) == counts);
    body(begin, Min(end, length) - begin, counts);
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
  const int64_t chunk = partition.Chunk(item), fold = partition.fold;
  const int64_t tail = partition.HasTail(chunk) ? partition.tail / problem.channels : 0;
  const int64_t begin = partition.RowBegin(chunk) * fold, end = partition.RowEnd(chunk) * fold + tail;
  if (fold > 1) return {begin, end, 0, problem.channels};
  return {begin, end, partition.ColumnBegin(item), partition.ColumnEnd(item)};
}

// Channels-last: rows that count are gathered in the cache, some columns of some rows at a time,
// and go through the same chains as rows that lie side by side.
template <typename T>
void MaskedRowMoments(const ForwardJob& job, int64_t item) {
  constexpr int kRowsAtOnce = ColumnMoments<T>::kRowsAtOnce;
  constexpr int64_t kRows = kMomentsChainRows<Param<T>>;
  constexpr int64_t kColumns = (32 << 10) / (kRows * static_cast<int64_t>(sizeof(T)));
  const UnfoldedRows rows = RowsOfItem(job.problem, job.partition, item);
  const int64_t slot = job.partition.Slot(item, 0);
  alignas(64) T gathered[kRows * kColumns];
  for (int64_t begin = rows.column_begin; begin < rows.column_end; begin += kColumns) {
    const int64_t columns = Min(kColumns, rows.column_end - begin);
    ColumnMoments<T> moments(job.partials.first + slot + begin, job.partials.second + slot + begin, columns);
    int64_t waiting = 0;
    const auto add = [&] {
      const int64_t steps = waiting / kRowsAtOnce, rest = waiting % kRowsAtOnce;
      if (steps > 0) moments.template AddChain<kRowsAtOnce>(gathered, steps, kRowsAtOnce * columns, columns, columns);
      if (rest > 0)
        moments.template AddChain<1>(gathered + (waiting - rest) * columns, rest, columns, columns, columns);
      waiting = 0;
    };
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      if (!job.mask.flags[r]) continue;
      const T* x = static_cast<const T*>(job.arrays.x) + r * job.problem.channels + begin;
      std::memcpy(gathered + waiting * columns, x, static_cast<size_t>(columns) * sizeof(T));
      if (++waiting == kRows) add();
    }
    add();
    for (int64_t j = 0; j < columns; ++j) job.partials.count[slot + begin + j] = static_cast<double>(moments.count());
  }
}

// Channels-first: stretches of planes.
template <typename T>
void MaskedPlaneMoments(const ForwardJob& job, int64_t item) {
  const Partition& partition = job.partition;
  const int64_t chunk = partition.Chunk(item);
  ForEachTotals<PlaneMoments<T>>(job, item, [&](PlaneMoments<T>* moments, int64_t group_begin, int64_t group_end) {
    for (int64_t r = partition.RowBegin(chunk); r < partition.RowEnd(chunk); ++r) {
      for (int64_t c = group_begin; c < group_end; ++c) {
        const Run run = SegmentRun(job.problem, partition, r, c);
        ForEachStretch(job.mask, run.offset, run.length, [&](int64_t begin, int64_t length, bool counts) {
          const MomentsInputs<T> stretch[] = {{At<const T>(job.arrays.x, run) + begin}};
          if (counts) moments[c - group_begin].Add(stretch, job.coefficients, c, length);
        });
      }
    }
  });
}

template <typename T>
void MaskedMoments(const ForwardJob& job, int64_t item) {
  if (job.partition.channels_last) {
    MaskedRowMoments<T>(job, item);
  } else {
    MaskedPlaneMoments<T>(job, item);
  }
}

// dx = dz * slope, and where elements count, + (x - mean) * tilt + shift
template <typename T>
void MaskedGradientNormalize(const BackwardJob& job, int64_t item) {
  using P = Param<T>;
  ForEachRun(job.problem, job.partition, item, [&](const Run& run) {
    ForEachStretch(job.mask, run.offset, run.length, [&](int64_t begin, int64_t length, bool counts) {
      const Run stretch{run.offset + begin, length, run.row, run.column};
      GradientNormalizeWork<T, Unknown> work(job, stretch, nullptr);
      work.has_statistics_terms = counts;
      if (job.partition.channels_last) {
        TraverseRun(work, ColumnCoefficients<P>(job.coefficients, run.column + begin), length);
      } else {
        TraverseRun(work, ChannelCoefficients<P>(job.coefficients, run.column), length);
      }
    });
  });
  StreamFence();
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_MASKED_H_
