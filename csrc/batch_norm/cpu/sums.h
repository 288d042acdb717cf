// The way of a pass that sums: down the columns of channels-last data, or along the planes of a channel.
//
// Two numbers of each element are summed. What they are is given as Inputs, which have a run's arrays, and
//
// - Fetch(i), and FetchRow(i) where rows are summed, prepare to read from i on,
// - Read<kPartial>(c, column, i, n) reads elements i to i + n, all lanes or fewer, and computes an Input,
// - Finish(inputs) does to a few of them what takes less time together,
// - Add(input, &first, &second) adds the two numbers.
//
// Sums run in chains of a few additions of the compute type, so that their rounding stays small. Chains join in double.

#ifndef TFOPS_BATCH_NORM_CPU_SUMS_H_
#define TFOPS_BATCH_NORM_CPU_SUMS_H_

#include <type_traits>

#include "csrc/batch_norm/cpu/coefficients.h"
#include "csrc/batch_norm/cpu/runs.h"
#include "csrc/batch_norm/cpu/stored.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

constexpr int64_t kChainRows = 32;  // additions before a chain ends
// Vectors that are added to one sum each: as many independent sums hide the latency of an addition.
constexpr int kUnroll = 4;
static_assert(kUnroll == kRunsAtOnce, "runs that are summed together have a sum each");

// ---------------------------------------------------------------------------------------------------------------------
// The sums of columns stay in the first two caches, and a few rows pass through them at a time. These are not
// neighbours, but lie a part of the chunk apart, so that memory is read in as many streams, each of them straight
// ahead: prefetching wants whole pages, and rows are often less.

template <typename P>
struct ColumnSums {
  alignas(64) P first[kMaxColumns];
  alignas(64) P second[kMaxColumns];
};

// Calls body(partial, j, n) for vectors of columns j to j + n, partial being a true or false constant: whether n is
// less than all lanes.
template <typename P, typename Body>
TFOPS_INLINE void ForEachVector(int64_t columns, Body body) {
  constexpr int kL = kLanes<P>;
  int64_t j = 0;
  for (; j + kL <= columns; j += kL) body(std::false_type(), j, kL);
  if (j < columns) body(std::true_type(), j, columns - j);
}

// Adds rows to the sums of columns. Their own sums come first, for shorter chains round less.
template <int kRows, typename Inputs, typename C>
TFOPS_INLINE void AddRows(const Inputs (&rows)[kRows], const C& c, int64_t columns,
                          ColumnSums<typename Inputs::P>* sums) {
  using P = typename Inputs::P;
  ForEachVector<P>(columns, [&](auto partial, int64_t j, int64_t n) {
    typename Inputs::Input inputs[kRows];
    for (int r = 0; r < kRows; ++r) {
      rows[r].FetchRow(j);
      inputs[r] = rows[r].template Read<decltype(partial)::value>(c, j, j, n);
    }
    rows[0].Finish(inputs);
    Vec<P> first{}, second{};
    for (int r = 0; r < kRows; ++r) Inputs::Add(inputs[r], &first, &second);
    Store(sums->first + j, Load(sums->first + j) + first);
    Store(sums->second + j, Load(sums->second + j) + second);
  });
}

// Cuts an item's rows into chains. Calls add(rows_at_once, row, steps, apart, begin, end) for each: `steps` times so
// many rows of columns `begin` to `end`, from `row` on, which are `apart` rows apart within a step. steps_of(count):
// the steps of a chain with `count` rows before it. rows_at_once is a constant, and 1 for what is left over.
template <int kRows, typename StepsOf, typename AddChain>
TFOPS_INLINE void ForEachColumnChain(const Partition& partition, int64_t item, StepsOf steps_of, AddChain add) {
  const int64_t chunk = partition.Chunk(item);
  const int64_t columns_begin = partition.ColumnBegin(item), columns_end = partition.ColumnEnd(item);
  const int64_t begin = partition.RowBegin(chunk), end = partition.RowEnd(chunk);
  const int64_t apart = (end - begin) / kRows;
  for (int64_t i = 0, steps; i < apart; i += steps) {
    steps = Min(steps_of(i * kRows), apart - i);
    add(std::integral_constant<int, kRows>(), begin + i, steps, apart, columns_begin, columns_end);
  }
  const std::integral_constant<int, 1> one;
  const int64_t rest = begin + apart * kRows;
  if (rest < end) add(one, rest, end - rest, 0, columns_begin, columns_end);
  if (partition.HasTail(chunk)) add(one, partition.rows, 1, 0, 0, partition.tail);
}

// ---------------------------------------------------------------------------------------------------------------------
// The sums of planes. Chains along lanes take one run at a time, or kUnroll together that lie far apart: memory is then
// read in as many streams, each of them straight ahead.

// The elements of a chain, of each of kRuns runs. Pieces of a run that begin at multiples of it begin at whole bytes of
// its bits.
template <int kRuns, int64_t kAdditions, typename P>
constexpr int64_t kChainElements = kAdditions * (kUnroll / kRuns) * kLanes<P>;

// The additions to each sum that so many elements take. A short piece costs one too, so elements alone do not tell.
template <int kRuns, typename P>
TFOPS_INLINE int64_t AdditionsOf(int64_t elements) {
  constexpr int64_t kElements = kChainElements<kRuns, 1, P>;
  return (elements + kElements - 1) / kElements;
}

template <typename P>
struct PlaneSums {
  Vec<P> first[kUnroll];
  Vec<P> second[kUnroll];

  void Clear() {
    for (int v = 0; v < kUnroll; ++v) first[v] = second[v] = Vec<P>{};
  }
  static TFOPS_INLINE double Total(const Vec<P> (&v)[kUnroll]) {
    static_assert(kUnroll == 4);
    return SumOfLanes<P>((v[0] + v[1]) + (v[2] + v[3]));
  }
};

// Adds vectors i, i + lanes, ... of one run, or vectors i of kCount runs, to kCount sums from `sum` on.
template <bool kPartial, int kCount, typename Inputs, int kRuns, typename C>
TFOPS_INLINE void AddVectors(const Inputs (&runs)[kRuns], const C& c, int sum, int64_t i, int64_t n,
                             PlaneSums<typename Inputs::P>* sums) {
  typename Inputs::Input inputs[kCount];
  for (int v = 0; v < kCount; ++v) {
    const Inputs& run = runs[kRuns == 1 ? 0 : v];
    const int64_t at = kRuns == 1 ? i + v * Inputs::kL : i;
    run.Fetch(at);
    inputs[v] = run.template Read<kPartial>(c, at, at, n);
  }
  runs[0].Finish(inputs);
  for (int v = 0; v < kCount; ++v) Inputs::Add(inputs[v], &sums->first[sum + v], &sums->second[sum + v]);
}

// Adds elements `begin` to `end` of one run, or of each of kUnroll.
template <typename Inputs, int kRuns, typename C>
TFOPS_INLINE void AddPiece(const Inputs (&runs)[kRuns], const C& c, int64_t begin, int64_t end,
                           PlaneSums<typename Inputs::P>* sums) {
  static_assert(kRuns == 1 || kRuns == kUnroll);
  constexpr int kL = Inputs::kL;
  constexpr int64_t kStep = kRuns == 1 ? kUnroll * kL : kL;
  PlaneSums<typename Inputs::P> own = *sums;
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) AddVectors<false, kUnroll>(runs, c, 0, i, kL, &own);
  if constexpr (kRuns == 1) {
    for (int v = 0; v < kUnroll - 1 && i + kL <= end; ++v, i += kL) AddVectors<false, 1>(runs, c, v, i, kL, &own);
    if (i < end) AddVectors<true, 1>(runs, c, kUnroll - 1, i, end - i, &own);
  } else {
    if (i < end) AddVectors<true, kUnroll>(runs, c, 0, i, end - i, &own);
  }
  *sums = own;
}

// Sums an item's planes, by a Totals for each channel of a group. (These have no constructors, which would run for all
// of kMaxGroup, however few a group has.)
template <typename Totals, typename Job, typename Add>
TFOPS_INLINE void ForEachTotals(const Job& job, int64_t item, Add add) {
  ForEachGroup(job.partition, item, [&](int64_t begin, int64_t end) {
    Totals totals[kMaxGroup];
    for (int64_t c = begin; c < end; ++c) totals[c - begin].Begin();
    add(totals, begin, end);
    for (int64_t c = begin; c < end; ++c) totals[c - begin].Finish(job.partials, job.partition.Slot(item, c));
  });
}

template <typename Totals, typename Inputs, typename Job, typename InputsOf>
TFOPS_INLINE void SumPlanes(const Job& job, int64_t item, InputsOf inputs_of) {
  ForEachTotals<Totals>(job, item, [&](Totals* totals, int64_t begin, int64_t end) {
    ForEachRuns(job.problem, job.partition, item, begin, end, [&](const auto& runs, int64_t c) {
      constexpr int kRuns = std::extent_v<std::remove_reference_t<decltype(runs)>>;
      Inputs inputs[kRuns];
      for (int k = 0; k < kRuns; ++k) inputs[k] = inputs_of(runs[k]);
      totals[c - begin].Add(inputs, job.coefficients, c, runs[0].length);
    });
  });
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_SUMS_H_
