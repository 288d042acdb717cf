// Tiles: rows of channels-last data that are gone through together.

#ifndef TFOPS_BATCH_NORM_CPU_TILES_H_
#define TFOPS_BATCH_NORM_CPU_TILES_H_

#include <type_traits>

#include "csrc/batch_norm/cpu/runs.h"
#include "csrc/batch_norm/cpu/stored.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// Channels-last data are gone through by tiles, whose rows share coefficients: in the cache, to load three to five
// vectors of these for one or two of data is what takes time. Folded rows are cut into parts of whole tiles, so that
// fewer coefficients are in use.
//
// The rows of a tile lie a part of the chunk apart, so that data are read and written in as many streams, each of them
// straight ahead: a core sees what comes, and gets more of it from the last-level cache than in a single stream.
constexpr int kTileRows = 4;
// Vectors of a row, whose coefficients stay in registers. Conversions need some of these too.
template <typename T>
constexpr int kTileVectors = std::is_same_v<T, Param<T>> ? 4 : 2;
template <typename T>
constexpr int64_t kTileColumns = kTileVectors<T> * kLanes<Param<T>>;

// Into how many rows a folded row is cut: of whole tiles, and not so short that rows are begun all the time.
template <typename T>
TFOPS_INLINE int64_t PartsOfRow(const Partition& partition) {
  constexpr int64_t kMinElements = 1024 / sizeof(T);
  int64_t parts = partition.fold;  // a power of 2
  const auto is_too_small = [&](int64_t columns) { return columns < kMinElements || columns % kTileColumns<T> != 0; };
  while (parts > 1 && is_too_small(partition.columns / parts)) parts /= 2;
  return parts;
}

// Whether a job's rows go through tiles. Rows that are to be streamed have to be whole cache lines.
template <typename T>
TFOPS_INLINE bool HasTiles(Traversal traversal, const Partition& partition) {
  if (traversal != Traversal::kStreamedTiles) return traversal == Traversal::kTiles;
  return partition.columns / PartsOfRow<T>(partition) * static_cast<int64_t>(sizeof(T)) % kLineBytes == 0;
}

// Rows of an item, channels-last, or parts of rows; and the tail.
struct TileRows {
  Run first;
  int64_t count;
  int64_t stride;  // elements from one to the next
  int64_t tail;
};

template <typename T>
TFOPS_INLINE TileRows TileRowsOfItem(const Partition& partition, int64_t item) {
  const int64_t chunk = partition.Chunk(item);
  const int64_t row = partition.RowBegin(chunk);
  const int64_t parts = PartsOfRow<T>(partition);
  TileRows rows;
  rows.first = RowRun(partition, row, partition.ColumnBegin(item), partition.ColumnEnd(item));
  rows.first.length /= parts;
  rows.count = (partition.RowEnd(chunk) - row) * parts;
  rows.stride = partition.columns / parts;
  rows.tail = partition.HasTail(chunk) ? partition.tail : 0;
  return rows;
}

// Calls tiles(offset, stride) for kTileRows rows at a time, `stride` elements from one to the next, and then
// rest(offset, count, length) for rows that are left. `offset` is the first's, from the item's first element.
template <typename Tiles, typename Rest>
TFOPS_INLINE void ForEachTileRows(const TileRows& rows, Tiles tiles, Rest rest) {
  const int64_t apart = rows.count / kTileRows;
  for (int64_t i = 0; i < apart; ++i) tiles(i * rows.stride, apart * rows.stride);
  const int64_t done = apart * kTileRows;
  if (done < rows.count) rest(done * rows.stride, rows.count - done, rows.first.length);
  if (rows.tail > 0) rest(rows.count * rows.stride, 1, rows.tail);
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_TILES_H_
