// Which elements of a run are streamed, and how its end is written.

#ifndef TFOPS_BATCH_NORM_CPU_STREAMED_LINES_H_
#define TFOPS_BATCH_NORM_CPU_STREAMED_LINES_H_

#include "csrc/batch_norm/cpu/runs.h"
#include "csrc/batch_norm/cpu/stored.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

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

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_STREAMED_LINES_H_
