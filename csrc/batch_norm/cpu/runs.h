// Runs: stretches of contiguous elements that a kernel walks through, and where their activation bits are.

#ifndef TFOPS_BATCH_NORM_CPU_RUNS_H_
#define TFOPS_BATCH_NORM_CPU_RUNS_H_

#include "csrc/batch_norm/cpu/kernels.h"
#include "csrc/batch_norm/cpu/stored.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// Vectors a group: as many independent accumulators hide the latency of an addition.
constexpr int kUnroll = 4;
static_assert(kUnroll == kRunsAtOnce, "runs that are summed together have an accumulator each");
// Additions of the compute type before the sums join others in double.
constexpr int64_t kChainRows = 32;
// The same for moments. Each join rounds the mean by half an ulp of double: noticeable where the data are double too,
// whose own chains may be longer.
template <typename P>
constexpr int64_t kMomentsChainRows = sizeof(P) == 4 ? kChainRows : 4 * kChainRows;

TFOPS_INLINE constexpr int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls body(partial, i, n) for vectors of lanes i to i + n, partial being a true or false constant: whether n is less
// than all lanes.
template <typename P, typename Body>
TFOPS_INLINE void ForEachVector(int64_t length, Body body) {
  constexpr int kL = kLanes<P>;
  int64_t i = 0;
  for (; i + kL <= length; i += kL) body(std::false_type(), i, kL);
  if (i < length) body(std::true_type(), i, length - i);
}

// Chains along lanes take one run at a time, or kUnroll together that lie far apart: memory is then read in as many
// streams, each of them straight ahead. The elements of a chain of so many runs, of each of them. Pieces of a run that
// begin at multiples of it begin at whole bytes of its activation bits.
template <int kRuns, int64_t kAdditions, typename P>
constexpr int64_t kChainElements = kAdditions * (kUnroll / kRuns) * kLanes<P>;

// Calls body(partial, v, r, i, n) for the vectors of a piece of kRuns runs, v being the accumulator and r the run of
// it.
template <int kRuns, typename P, typename Body>
TFOPS_INLINE void ForEachVectorInTurn(int64_t begin, int64_t end, Body body) {
  static_assert(kRuns == 1 || kRuns == kUnroll);
  constexpr int kL = kLanes<P>;
  int64_t i = begin;
  if constexpr (kRuns == kUnroll) {
    for (; i + kL <= end; i += kL) {
      for (int v = 0; v < kUnroll; ++v) body(std::false_type(), v, v, i, kL);
    }
    for (int v = 0; v < kUnroll && i < end; ++v) body(std::true_type(), v, v, i, end - i);
  } else {
    for (; i + kUnroll * kL <= end; i += kUnroll * kL) {
      for (int v = 0; v < kUnroll; ++v) body(std::false_type(), v, 0, i + v * kL, kL);
    }
    for (int v = 0; v < kUnroll - 1 && i + kL <= end; ++v, i += kL) body(std::false_type(), v, 0, i, kL);
    if (i < end) body(std::true_type(), kUnroll - 1, 0, i, end - i);
  }
}

// The additions to an accumulator that this takes. A short piece costs one too, so elements alone do not tell.
template <int kRuns, typename P>
TFOPS_INLINE int64_t AdditionsOf(int64_t elements) {
  constexpr int64_t kElements = kChainElements<kRuns, 1, P>;
  return (elements + kElements - 1) / kElements;
}

template <typename P>
TFOPS_INLINE double SumOfAll(const Vec<P> (&v)[kUnroll]) {
  return SumOfLanes<P>((v[0] + v[1]) + (v[2] + v[3]));
}
static_assert(kUnroll == 4, "SumOfAll adds four");

struct Run {
  int64_t offset = 0;  // of its first element in the tensor
  int64_t length = 0;
  int64_t row = 0;     // see partition.h
  int64_t column = 0;  // of its first element; channels-first: the channel of all
};

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

// Calls body(runs, c) for every run of channels begin to end in the chunk of an item, channels-first: arrays of kUnroll
// runs, where they are as long as each other, or of one.
template <typename Body>
TFOPS_INLINE void ForEachRuns(const Problem& problem, const Partition& partition, int64_t item, int64_t begin,
                              int64_t end, Body body) {
  const int64_t row_begin = partition.RowBegin(partition.Chunk(item));
  const int64_t row_end = partition.RowEnd(partition.Chunk(item));
  const int64_t apart = (row_end - row_begin) / kUnroll;
  for (int64_t r = row_begin; r < row_end; ++r) {
    if (r == row_begin + apart) r += apart * (kUnroll - 1);  // what has been seen
    if (r == row_end) break;
    const int count = r < row_begin + apart ? kUnroll : 1;
    for (int64_t c = begin; c < end; ++c) {
      Run runs[kUnroll];
      bool alike = count == kUnroll;
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

// Channels-last data are gone through by tiles, whose rows share coefficients: in the cache, to load three to five
// vectors of these for one or two of data is what takes time. Folded rows are cut into parts of whole tiles, so that
// fewer coefficients are in use.
//
// The rows of a tile lie a part of the chunk apart, so that data are read and written in as many streams, each of them
// straight ahead: a core sees what comes, and gets more of it from the last-level cache than in a single stream.
template <Traversal kTraversal>
using TraversalConstant = std::integral_constant<Traversal, kTraversal>;

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
  while (parts > 1 && (partition.columns / parts < kMinElements || partition.columns / parts % kTileColumns<T> != 0))
    parts /= 2;
  return parts;
}

// Calls body with a TraversalConstant other than kNone, if a job's rows are to go through tiles. Returns whether it
// did. Rows that are to be streamed have to be whole cache lines.
template <typename T, typename Body>
TFOPS_INLINE bool WithTraversal(Traversal traversal, const Partition& partition, Body body) {
  const int64_t bytes = partition.columns / PartsOfRow<T>(partition) * static_cast<int64_t>(sizeof(T));
  if (traversal == Traversal::kNone || (traversal == Traversal::kStreamed && bytes % kLineBytes != 0)) return false;
  if (traversal == Traversal::kStreamed) {
    body(TraversalConstant<Traversal::kStreamed>());
  } else {
    body(TraversalConstant<Traversal::kApart>());
  }
  return true;
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

// The elements of a run that Stream is to write, by blocks: none, or its whole cache lines. Lines that a cache must
// fetch after all, for another part of them is written through it, are what takes long: short runs have too many.
struct StreamedLines {
  int64_t begin = 0;
  int64_t end = 0;

  TFOPS_INLINE bool IsEmpty() const { return begin == end; }
  TFOPS_INLINE bool operator==(const StreamedLines& other) const { return begin == other.begin && end == other.end; }
};

template <typename T>
inline constexpr int64_t kLineElements = kLineBytes / sizeof(T);

template <typename T>
TFOPS_INLINE StreamedLines LinesToStream(const T* p, int64_t length) {
  constexpr int64_t kMinBytes = 1024;
  constexpr int64_t kBlockBytes = kBlock * sizeof(T);
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % kLineBytes);
  // Half lines become whole by the run next to this one.
  if (past % Min(kBlockBytes, kLineBytes) == 0 && length % kBlock == 0) return {0, length};
  if (past % sizeof(T) != 0 || length * static_cast<int64_t>(sizeof(T)) < kMinBytes) return {};
  constexpr int64_t kUnit = kLineElements<T> > kBlock ? kLineElements<T> : kBlock;
  const int64_t begin = (kLineBytes - past) % kLineBytes / sizeof(T);
  return {begin, begin + (length - begin) / kUnit * kUnit};
}

// Whether the end of a run is written by a vector that overlaps the one before. One written in part would do too, but
// what reads on from there, if it reads where that writes, waits for it: 8 ns, which in a plane of 7x7 is the larger
// part.
template <typename T>
TFOPS_INLINE bool OverlapsItsEnd(int64_t length) {
  constexpr int64_t kMaxBytes = 2048;  // the end of longer runs is too small a part of them
  constexpr int kL = kLanes<Param<T>>;
  return length > kL && length % kL != 0 && length * static_cast<int64_t>(sizeof(T)) <= kMaxBytes;
}

// Whether such an end is read before anything is written. Of longer runs it is read when all but what it overlaps is:
// in the order of memory, without which prefetching loses its thread.
template <typename T>
TFOPS_INLINE bool IsReadAtOnce(int64_t length) {
  constexpr int64_t kMaxBytes = 256;
  return length * static_cast<int64_t>(sizeof(T)) <= kMaxBytes;
}

// ---------------------------------------------------------------------------------------------------------------------
// Activation bits. Their rows begin at whole bytes, and so do runs, but for one case: folded rows of C % 8 != 0
// channels. Their bits pass through a buffer, where they lie side by side as the elements do.

constexpr int64_t kRunBitsBytes = kMaxColumns / 8 + 8;  // words reach beyond the end

TFOPS_INLINE bool AreBitsBuffered(const Problem& problem, const Partition& partition) {
  return partition.fold > 1 && problem.channels % 8 != 0;
}

// Of one row of channels, not folded.
TFOPS_INLINE int64_t BitsRowBytes(const Problem& problem) { return (problem.channels + 7) / 8; }

TFOPS_INLINE int64_t BitsOffset(const Problem& problem, const Partition& partition, const Run& run) {
  if (partition.channels_last) return run.row * partition.fold * BitsRowBytes(problem) + run.column / 8;
  return run.offset / problem.inner * ((problem.inner + 7) / 8) + run.offset % problem.inner / 8;
}

// Where the activation bits of a run begin. Null without any. Byte: uint8_t or const uint8_t.
template <typename Byte>
TFOPS_INLINE Byte* BitsInPlace(const Problem& problem, const Partition& partition, const Run& run,
                               Byte* activation_bits) {
  return activation_bits ? activation_bits + BitsOffset(problem, partition, run) : nullptr;
}

// So many bits pass at a time: a word less what they may be shifted by.
constexpr int64_t kBitsAtOnce = 56;

// Calls body(bit, i, n) for the bits of a run's rows, at most kBitsAtOnce of them at a time: n bits that are the
// buffer's from `bit` on, and begin at byte i of the rows.
template <typename Body>
TFOPS_INLINE void ForEachBits(const Problem& problem, const Run& run, Body body) {
  const int64_t row_bytes = BitsRowBytes(problem);
  for (int64_t begin = 0, row = 0; begin < run.length; begin += problem.channels, row += row_bytes) {
    for (int64_t c = 0; c < problem.channels; c += kBitsAtOnce) {
      body(begin + c, row + c / 8, Min(kBitsAtOnce, problem.channels - c));
    }
  }
}

// Of all rows of a run.
TFOPS_INLINE int64_t BitsRunBytes(const Problem& problem, const Run& run) {
  return run.length / problem.channels * BitsRowBytes(problem);
}

// The bytes from i on, as many as a word has and there are.
TFOPS_INLINE uint64_t LoadWord(const uint8_t* bytes, int64_t i, int64_t count) {
  uint64_t word = 0;
  if (i + 8 <= count) {
    std::memcpy(&word, bytes + i, 8);
  } else {
    for (int64_t k = i; k < count; ++k) word |= uint64_t{bytes[k]} << (k - i) * 8;
  }
  return word;
}

TFOPS_INLINE void StoreWord(uint64_t word, uint8_t* bytes, int64_t i, int64_t count) {
  if (i + 8 <= count) {
    std::memcpy(bytes + i, &word, 8);
  } else {
    for (int64_t k = i; k < count; ++k) bytes[k] = static_cast<uint8_t>(word >> (k - i) * 8);
  }
}

// From the buffer to the rows of `run`. What a word writes beyond its bits, the next ones write again.
TFOPS_INLINE void ScatterBits(const Problem& problem, const Run& run, const uint8_t* buffer, uint8_t* rows) {
  const int64_t bytes = BitsRunBytes(problem, run);
  ForEachBits(problem, run, [&](int64_t bit, int64_t i, int64_t n) {
    uint64_t word;
    std::memcpy(&word, buffer + bit / 8, sizeof(word));
    StoreWord(word >> bit % 8 & ((uint64_t{1} << n) - 1), rows, i, bytes);
  });
}

// The reverse. Bits past a row's end, which should be zero, would else be those of the next.
TFOPS_INLINE void GatherBits(const Problem& problem, const Run& run, const uint8_t* rows, uint8_t* buffer) {
  const int64_t bytes = BitsRunBytes(problem, run);
  uint64_t pending = 0;  // so many bits, for the buffer from `buffer` on
  int64_t count = 0;
  ForEachBits(problem, run, [&](int64_t, int64_t i, int64_t n) {
    if (count + n >= 64) {
      std::memcpy(buffer, &pending, sizeof(pending));
      buffer += count / 8;
      pending >>= count / 8 * 8;
      count %= 8;
    }
    pending |= (LoadWord(rows, i, bytes) & ((uint64_t{1} << n) - 1)) << count;
    count += n;
  });
  std::memcpy(buffer, &pending, sizeof(pending));
}

// The bits of a run as the gradient reads them: in place, or gathered into the buffer. Null without any.
TFOPS_INLINE const uint8_t* BitsOfRun(const Problem& problem, const Partition& partition, const Run& run,
                                      const uint8_t* activation_bits, uint8_t* buffer) {
  const uint8_t* rows = BitsInPlace(problem, partition, run, activation_bits);
  if (!rows || !AreBitsBuffered(problem, partition)) return rows;
  GatherBits(problem, run, rows, buffer);
  return buffer;
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_RUNS_H_
