// How a problem is cut into work items, and where an item's intermediate results go.
//
// The cut depends on the problem alone, never on the number of threads: so the results don't either.

#ifndef TFOPS_BATCH_NORM_CPU_PARTITION_H_
#define TFOPS_BATCH_NORM_CPU_PARTITION_H_

#include "csrc/batch_norm/batch_norm.h"

namespace tfops::cpu {

// Vector code works on blocks of 16 elements: one AVX-512 register of float32, two bytes of mask.
inline constexpr int64_t kBlock = 16;
inline constexpr int64_t kLineBytes = 64;     // of a cache line
inline constexpr int64_t kMaxColumns = 4096;  // of an item, channels-last
inline constexpr int64_t kRunsAtOnce = 4;     // channels-first: rows of a channel that are summed together
inline constexpr int64_t kRowUnit = 8;        // channels-last: rows that are; chunks have whole units, but for the last
inline constexpr int64_t kMaxGroup = 64;      // see Partition::group

// Channels-last data are a matrix of `rows` x `columns`. A column is a channel, unless few or ragged channels would
// leave vectors part empty: then `fold` consecutive rows are laid side by side and seen as one, column j holding
// channel j % channels, with fold * channels a multiple of kBlock. What does not fill a row of the matrix is its last,
// shorter row, of `tail` columns.
//
// Channels-first data are planes of `inner` elements. A column is a channel, a row is a segment of a plane.
struct Partition {
  bool channels_last = true;
  int64_t columns = 0;
  int64_t rows = 0;  // whole ones
  int64_t fold = 1;
  int64_t tail = 0;

  int64_t segment = 0;             // channels-first: elements of a segment (the last of a plane may be shorter)
  int64_t segments_per_plane = 0;  // rows = outer * segments_per_plane
  int64_t group = 1;  // channels-first: channels gone through side by side, so that small planes make long runs

  // Work items are column blocks x chunks of rows. Each chunk has statistics of its own for every column. With a single
  // chunk an item has all of its channels' elements, and goes through all phases while they are in the cache.
  int64_t column_block = 0;
  int64_t column_blocks = 0;
  int64_t chunks = 0;

  TFOPS_INLINE int64_t Items() const { return column_blocks * chunks; }
  TFOPS_INLINE bool IsWhole() const { return chunks == 1; }
  TFOPS_INLINE int64_t ColumnBegin(int64_t item) const { return item % column_blocks * column_block; }
  TFOPS_INLINE int64_t ColumnEnd(int64_t item) const {
    const int64_t end = ColumnBegin(item) + column_block;
    return end < columns ? end : columns;
  }
  TFOPS_INLINE int64_t Chunk(int64_t item) const { return item / column_blocks; }
  // Where an item's partial statistics of a column are.
  TFOPS_INLINE int64_t Slot(int64_t item, int64_t column) const { return Chunk(item) * columns + column; }
  TFOPS_INLINE int64_t RowBegin(int64_t chunk) const {
    if (chunk == chunks) return rows;
    const int64_t unit = channels_last ? kRowUnit : 1;
    const int64_t units = rows / unit;
    return (units / chunks * chunk + (chunk < units % chunks ? chunk : units % chunks)) * unit;
  }
  TFOPS_INLINE int64_t RowEnd(int64_t chunk) const { return RowBegin(chunk + 1); }
  TFOPS_INLINE bool HasTail(int64_t chunk) const { return tail > 0 && chunk == chunks - 1; }
};

// has_rows: whether channels-last data may be taken for rows; else they are planes of one element.
Partition MakePartition(const Problem& problem, bool backward, bool has_rows = true);

}  // namespace tfops::cpu

#endif  // TFOPS_BATCH_NORM_CPU_PARTITION_H_
