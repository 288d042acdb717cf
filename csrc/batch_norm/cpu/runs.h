// Runs: the stretches of contiguous elements that an item has.

#ifndef TFOPS_BATCH_NORM_CPU_RUNS_H_
#define TFOPS_BATCH_NORM_CPU_RUNS_H_

#include "csrc/batch_norm/cpu/kernels.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

TFOPS_INLINE constexpr int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

struct Run {
  int64_t offset = 0;  // of its first element in the tensor
  int64_t length = 0;
  int64_t row = 0;     // see partition.h
  int64_t column = 0;  // of its first element; channels-first: the channel of all
};

// Where a run begins in a tensor's array, which may be null.
template <typename T, typename Void>
TFOPS_INLINE T* At(Void* array, const Run& run) {
  return array ? static_cast<T*>(array) + run.offset : nullptr;
}

TFOPS_INLINE Run RowRun(const Partition& partition, int64_t row, int64_t column_begin, int64_t column_end) {
  return {row * partition.columns + column_begin, column_end - column_begin, row, column_begin};
}

TFOPS_INLINE Run SegmentRun(const Problem& problem, const Partition& partition, int64_t row, int64_t channel) {
  if (partition.segments_per_plane == 1) {  // spares small planes two divisions
    return {(row * problem.channels + channel) * problem.inner, problem.inner, row, channel};
  }
  const int64_t plane = row / partition.segments_per_plane * problem.channels + channel;
  const int64_t begin = row % partition.segments_per_plane * partition.segment;
  return {plane * problem.inner + begin, Min(partition.segment, problem.inner - begin), row, channel};
}

// Elements of a channel in the rows before `row`, channels-first.
TFOPS_INLINE int64_t ElementsBefore(const Problem& problem, const Partition& partition, int64_t row) {
  return row / partition.segments_per_plane * problem.inner + row % partition.segments_per_plane * partition.segment;
}

// Calls body(begin, end) for the groups of channels of an item, channels-first.
template <typename Body>
TFOPS_INLINE void ForEachGroup(const Partition& partition, int64_t item, Body body) {
  const int64_t end = partition.ColumnEnd(item);
  for (int64_t c = partition.ColumnBegin(item); c < end; c += partition.group) body(c, Min(c + partition.group, end));
}

// Calls body(runs, c) for every run of channels begin to end in the chunk of an item, channels-first: arrays of
// kRunsAtOnce runs, where they are as long as each other, or of one.
template <typename Body>
TFOPS_INLINE void ForEachRuns(const Problem& problem, const Partition& partition, int64_t item, int64_t begin,
                              int64_t end, Body body) {
  const int64_t row_begin = partition.RowBegin(partition.Chunk(item));
  const int64_t row_end = partition.RowEnd(partition.Chunk(item));
  const int64_t apart = (row_end - row_begin) / kRunsAtOnce;
  for (int64_t r = row_begin; r < row_end; ++r) {
    if (r == row_begin + apart) r += apart * (kRunsAtOnce - 1);  // what has been seen
    if (r == row_end) break;
    const int count = r < row_begin + apart ? kRunsAtOnce : 1;
    for (int64_t c = begin; c < end; ++c) {
      Run runs[kRunsAtOnce];
      bool alike = count == kRunsAtOnce;
      for (int k = 0; k < count; ++k) {
        runs[k] = SegmentRun(problem, partition, r + k * apart, c);
        alike = alike && runs[k].length == runs[0].length;
      }
      if (alike) {
        body(runs, c);
        continue;
      }
      for (int k = 0; k < count; ++k) {
        const Run one[] = {runs[k]};
        body(one, c);
      }
    }
  }
}

// Every run of an item, channels-last: rows, and the tail.
template <typename Body>
TFOPS_INLINE void ForEachRow(const Partition& partition, int64_t item, Body body) {
  const int64_t chunk = partition.Chunk(item);
  const int64_t column_begin = partition.ColumnBegin(item);
  const int64_t column_end = partition.ColumnEnd(item);
  const int64_t row_end = partition.RowEnd(chunk);
  for (int64_t r = partition.RowBegin(chunk); r < row_end; ++r) body(RowRun(partition, r, column_begin, column_end));
  if (partition.HasTail(chunk)) body(RowRun(partition, partition.rows, 0, partition.tail));
}

// Every run of an item, channels-first: segments of planes, those of a group of channels row by row.
template <typename Body>
TFOPS_INLINE void ForEachSegment(const Problem& problem, const Partition& partition, int64_t item, Body body) {
  const int64_t row_begin = partition.RowBegin(partition.Chunk(item));
  const int64_t row_end = partition.RowEnd(partition.Chunk(item));
  ForEachGroup(partition, item, [&](int64_t group_begin, int64_t group_end) {
    for (int64_t r = row_begin; r < row_end; ++r) {
      for (int64_t c = group_begin; c < group_end; ++c) body(SegmentRun(problem, partition, r, c));
    }
  });
}

// Every run of an item, of either layout.
template <typename Body>
TFOPS_INLINE void ForEachRun(const Problem& problem, const Partition& partition, int64_t item, Body body) {
  if (partition.channels_last) {
    ForEachRow(partition, item, body);
  } else {
    ForEachSegment(problem, partition, item, body);
  }
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_RUNS_H_
