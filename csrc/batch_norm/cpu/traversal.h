// The way of a pass over elements: through runs, tiles, lines past the cache, and ends.
//
// What there is to do is given as a Pass, whose Work<K> is made of a job, a run and its bits. It has the run's arrays
// by value, and these functions, which take the coefficients c from `column` on:
//
// - Read<kPartial>(c, column, i, n) reads elements i to i + n, all lanes or fewer, and computes an Input.
// - Write<kPartial>(input, c, column, i, n, skip, bits) writes the results, but for the first `skip` bits.
// - Block<kStream, kInPlace, kCount>(c, column, i, bits) does both for kCount elements. If kInPlace, their bits begin
//   at a whole byte.
//
// Bits is what passes activation bits on from vector to vector.

#ifndef TFOPS_BATCH_NORM_CPU_TRAVERSAL_H_
#define TFOPS_BATCH_NORM_CPU_TRAVERSAL_H_

#include "csrc/batch_norm/cpu/activation_bits.h"
#include "csrc/batch_norm/cpu/coefficients.h"
#include "csrc/batch_norm/cpu/known.h"
#include "csrc/batch_norm/cpu/streamed_lines.h"
#include "csrc/batch_norm/cpu/tiles.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// Whole blocks of elements `begin` to `end` from i and `column` on, by copies of work and coefficients, which so stay
// in registers. Returns where they end.
template <bool kStream, int64_t kCount, typename Work, typename C>
TFOPS_INLINE int64_t TraverseBlocks(const Work work, const C c, int64_t column, int64_t i, int64_t begin, int64_t end,
                                    typename Work::Bits* bits) {
  typename Work::Bits own = *bits;
  int64_t k = begin;
  for (; k + kCount <= end; k += kCount) {
    work.template Block<kStream, !kStream, kCount>(c, column + k, i + k, &own);
  }
  *bits = own;
  return k;
}

// Blocks of as many elements as this work takes at once, and then smaller ones.
template <bool kStream, typename Work, typename C>
TFOPS_INLINE int64_t TraverseAllBlocks(const Work& work, const C& c, int64_t column, int64_t i, int64_t begin,
                                       int64_t end, typename Work::Bits* bits) {
  constexpr int64_t kMost = Work::template BlockElements<kStream, C>();
  begin = TraverseBlocks<kStream, kMost>(work, c, column, i, begin, end, bits);
  if constexpr (kMost > kBlock) begin = TraverseBlocks<kStream, kBlock>(work, c, column, i, begin, end, bits);
  return begin;
}

// A vector, or with kPartial n of its elements.
template <bool kPartial, typename Work, typename C>
TFOPS_INLINE void TraverseVector(const Work& work, const C& c, int64_t column, int64_t i, int64_t n,
                                 typename Work::Bits* bits) {
  const auto input = work.template Read<kPartial>(c, column, i, n);
  work.template Write<kPartial>(input, c, column, i, n, 0, bits);
}

// Vectors, of which some may be written in part. They are out of line, for there are few.
template <typename Work, typename C>
__attribute__((noinline)) void TraverseVectors(const Work work, const C c, int64_t column, int64_t i, int64_t length,
                                               typename Work::Bits* bits) {
  for (int64_t k = 0; k < length; k += Work::kL) {
    TraverseVector<true>(work, c, column + k, i + k, Min(Work::kL, length - k), bits);
  }
}

template <typename Work, typename C>
TFOPS_INLINE void TraverseKnownRun(const Work& work, const C& c, int64_t column, int64_t i, int64_t length) {
  constexpr int kL = Work::kL;
  using T = typename Work::Element;
  typename Work::Bits bits = work.BitsFrom(i);
  const StreamedLines lines = work.Lines(i, length);
  if (!lines.IsEmpty()) {
    if (lines.begin > 0) TraverseVectors(work, c, column, i, lines.begin, &bits);
    TraverseAllBlocks<true>(work, c, column, i, lines.begin, lines.end, &bits);
    if (lines.end < length) TraverseVectors(work, c, column + lines.end, i + lines.end, length - lines.end, &bits);
    return bits.Finish();
  }
  if (!OverlapsItsEnd<T>(length)) {
    const int64_t k = TraverseAllBlocks<false>(work, c, column, i, 0, length, &bits);
    for (int64_t v = k; v < length; v += kL) {
      TraverseVector<true>(work, c, column + v, i + v, Min(kL, length - v), &bits);
    }
    return bits.Finish();
  }
  // The last vector overlaps the one before. So it is read before that is written, perhaps to the same place: of short
  // runs first of all, of others when all but what it overlaps is written.
  const bool at_once = IsReadAtOnce<T>(length);
  const int64_t last = length - kL;
  typename Work::Input input{};
  if (at_once) input = work.template Read<false>(c, column + last, i + last, kL);
  int64_t k = TraverseAllBlocks<false>(work, c, column, i, 0, at_once ? length : last, &bits);
  if (!at_once) input = work.template Read<false>(c, column + last, i + last, kL);
  for (; k < last; k += kL) TraverseVector<false>(work, c, column + k, i + k, kL, &bits);
  work.template Write<false>(input, c, column + last, i + last, kL, k - last, &bits);
  bits.Finish();
}

// A run of which nothing is known. It is out of line, for it is what is left over in many places, or rare.
template <typename Work, typename C>
__attribute__((noinline)) void TraverseUnknownRun(const Work& work, const C& c, int64_t column, int64_t i,
                                                  int64_t length) {
  static_assert(!Work::Knows::kIsKnown);
  TraverseKnownRun(work, c, column, i, length);
}

template <typename Work, typename C>
TFOPS_INLINE void TraverseRun(const Work& work, const C& c, int64_t length) {
  if constexpr (Work::Knows::kIsKnown) {
    TraverseKnownRun(work, c, 0, 0, length);
  } else {
    TraverseUnknownRun(work, c, 0, 0, length);
  }
}

// Whole tiles of kTileRows rows from i on, `stride` elements from one to the next. Returns the columns that they have.
template <bool kStream, typename Work, typename P>
TFOPS_INLINE int64_t TraverseTiles(const Work work, const ColumnCoefficients<P> columns, int64_t i, int64_t stride,
                                   int64_t length) {
  using T = typename Work::Element;
  using C = TileCoefficients<P, kTileVectors<T>, Work::kUsedCoefficients>;
  constexpr int64_t kColumns = kTileColumns<T>;
  constexpr int64_t kStep =
      Work::Knows::kIsKnown ? Min(kColumns, Work::template BlockElements<kStream, C>()) : kColumns;
  int64_t column = 0;
  for (; column + kColumns <= length; column += kColumns) {
    const C c(columns, column);
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t at = i + r * stride + column;
      typename Work::Bits bits = work.BitsFrom(at);
#pragma GCC unroll 8  // so that coefficients stay in registers
      for (int k = 0; k < kColumns / kStep; ++k) {
        work.template Block<kStream, true, kStep>(c, k * kStep, at + k * kStep, &bits);
      }
    }
  }
  return column;
}

template <typename Pass, bool kStream, typename K, typename Job>
TFOPS_INLINE void TraverseTiledItem(const Job& job, int64_t item) {
  using T = typename Pass::Element;
  const TileRows rows = TileRowsOfItem<T>(job.partition, item);
  const auto bits = BitsInPlace(job.problem, job.partition, rows.first, job.arrays.activation_bits);
  typename Pass::template Work<K> work(job, rows.first, bits);
  work.StopFetching();  // cores follow the rows of tiles by themselves
  const typename Pass::template Work<Unknown> any(job, rows.first, bits);
  const ColumnCoefficients<Param<T>> c(job.coefficients, rows.first.column);
  const auto rest = [&](int64_t i, int64_t count, int64_t stride, int64_t column, int64_t length) {
    for (int64_t r = 0; r < count; ++r) TraverseUnknownRun(any, c, column, i + r * stride + column, length - column);
  };
  const auto tiles = [&](int64_t i, int64_t stride) {
    const int64_t column = TraverseTiles<kStream>(work, c, i, stride, rows.first.length);
    if (column < rows.first.length) rest(i, kTileRows, stride, column, rows.first.length);
  };
  ForEachTileRows(rows, tiles,
                  [&](int64_t i, int64_t count, int64_t length) { rest(i, count, rows.stride, 0, length); });
}

template <typename Pass, typename K, typename Job>
TFOPS_INLINE void TraverseRunsOfItem(const Job& job, int64_t item) {
  using P = Param<typename Pass::Element>;
  using Work = typename Pass::template Work<K>;
  const Problem& problem = job.problem;
  const Partition& partition = job.partition;
  const auto bits = job.arrays.activation_bits;
  if (!partition.channels_last) {
    return ForEachSegment(problem, partition, item, [&](const Run& run) {
      const Work work(job, run, BitsInPlace(problem, partition, run, bits));
      TraverseRun(work, ChannelCoefficients<P>(job.coefficients, run.column), run.length);
    });
  }
  ForEachRow(partition, item, [&](const Run& run) {
    uint8_t buffer[kRunBitsBytes];
    const Work work(job, run, BeginBits(problem, partition, run, bits, buffer));
    TraverseRun(work, ColumnCoefficients<P>(job.coefficients, run.column), run.length);
    EndBits(problem, partition, run, bits, buffer);
  });
}

template <typename Pass, typename Job>
void TraverseItem(const Job& job, int64_t item) {
  const bool tiles = HasTiles<typename Pass::Element>(job.traversal, job.partition);
  const bool streamed = tiles && job.traversal == Traversal::kStreamedTiles;
  Pass::WithKnown(job, tiles && !streamed, [&](auto known) {
    using K = decltype(known);
    if constexpr (!K::kIsCached && !K::kIsInPlace) {
      if (streamed) return TraverseTiledItem<Pass, true, K>(job, item);
    }
    if constexpr (!K::kIsInPlace && (!K::kIsKnown || K::kIsCached || !kHasCachedLoops)) {
      if (tiles) return TraverseTiledItem<Pass, false, K>(job, item);
    }
    TraverseRunsOfItem<Pass, K>(job, item);
  });
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_TRAVERSAL_H_
