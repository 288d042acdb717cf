// The bits that say where an activation has slope 1: where those of a run lie, and how they are read and written.
//
// Rows of bits begin at whole bytes, and so do runs, but for one case: folded rows of C % 8 != 0 channels. Their bits
// pass through a buffer, where they lie side by side as the elements do.

#ifndef TFOPS_BATCH_NORM_CPU_ACTIVATION_BITS_H_
#define TFOPS_BATCH_NORM_CPU_ACTIVATION_BITS_H_

#include <cstring>
#include <type_traits>

#include "csrc/batch_norm/cpu/runs.h"
#include "csrc/batch_norm/cpu/simd.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

constexpr int64_t kRunBitsBytes = kMaxColumns / 8 + 8;  // words reach beyond the end of a run

TFOPS_INLINE bool AreBitsBuffered(const Problem& problem, const Partition& partition) {
  return partition.fold > 1 && problem.channels % 8 != 0;
}

// The bytes of one row of channels, not folded.
TFOPS_INLINE int64_t BitsRowBytes(const Problem& problem) { return (problem.channels + 7) / 8; }

// The bytes of all rows of a run.
TFOPS_INLINE int64_t BitsRunBytes(const Problem& problem, const Run& run) {
  return run.length / problem.channels * BitsRowBytes(problem);
}

TFOPS_INLINE int64_t BitsOffset(const Problem& problem, const Partition& partition, const Run& run) {
  if (partition.channels_last) return run.row * partition.fold * BitsRowBytes(problem) + run.column / 8;
  return run.offset / problem.inner * ((problem.inner + 7) / 8) + run.offset % problem.inner / 8;
}

// Where the bits of a run begin. Null without bits. Byte: uint8_t or const uint8_t.
template <typename Byte>
TFOPS_INLINE Byte* BitsInPlace(const Problem& problem, const Partition& partition, const Run& run, Byte* bits) {
  return bits ? bits + BitsOffset(problem, partition, run) : nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------
// Bits go between rows and buffer in words of at most so many: 64, less what they may be shifted by.
constexpr int64_t kBitsAtOnce = 56;

// Calls body(bit, i, n) for n bits at a time, which are those from `bit` on in the buffer, and begin at byte i of the
// rows.
template <typename Body>
TFOPS_INLINE void ForEachBits(const Problem& problem, const Run& run, Body body) {
  const int64_t row_bytes = BitsRowBytes(problem);
  for (int64_t begin = 0, row = 0; begin < run.length; begin += problem.channels, row += row_bytes) {
    for (int64_t c = 0; c < problem.channels; c += kBitsAtOnce) {
      body(begin + c, row + c / 8, Min(kBitsAtOnce, problem.channels - c));
    }
  }
}

// The bytes from i on, as many as a word has and there are up to `count`.
TFOPS_INLINE uint64_t LoadWord(const uint8_t* bytes, int64_t i, int64_t count) {
  if (i + 8 <= count) return LoadBits<uint64_t>(bytes + i);
  uint64_t word = 0;
  for (int64_t k = i; k < count; ++k) word |= uint64_t{bytes[k]} << (k - i) * 8;
  return word;
}

TFOPS_INLINE void StoreWord(uint64_t word, uint8_t* bytes, int64_t i, int64_t count) {
  if (i + 8 <= count) {
    std::memcpy(bytes + i, &word, 8);
  } else {
    for (int64_t k = i; k < count; ++k) bytes[k] = static_cast<uint8_t>(word >> (k - i) * 8);
  }
}

// Copies bits from the buffer to the rows of `run`. What a word writes beyond its bits, the next ones write again.
TFOPS_INLINE void ScatterBits(const Problem& problem, const Run& run, const uint8_t* buffer, uint8_t* rows) {
  const int64_t bytes = BitsRunBytes(problem, run);
  ForEachBits(problem, run, [&](int64_t bit, int64_t i, int64_t n) {
    StoreWord(LoadBits<uint64_t>(buffer + bit / 8) >> bit % 8 & ((uint64_t{1} << n) - 1), rows, i, bytes);
  });
}

// Copies bits from the rows to the buffer. What is past a row's end, which should be zero, is left out.
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

// Where to write the bits of a run: in place, or in the buffer, from which EndBits takes them. Null without bits.
TFOPS_INLINE uint8_t* BeginBits(const Problem& problem, const Partition& partition, const Run& run, uint8_t* bits,
                                uint8_t* buffer) {
  return bits && AreBitsBuffered(problem, partition) ? buffer : BitsInPlace(problem, partition, run, bits);
}
TFOPS_INLINE void EndBits(const Problem& problem, const Partition& partition, const Run& run, uint8_t* bits,
                          const uint8_t* buffer) {
  if (!bits || !AreBitsBuffered(problem, partition)) return;
  ScatterBits(problem, run, buffer, BitsInPlace(problem, partition, run, bits));
}

// Where to read them.
TFOPS_INLINE const uint8_t* BeginBits(const Problem& problem, const Partition& partition, const Run& run,
                                      const uint8_t* bits, uint8_t* buffer) {
  const uint8_t* rows = BitsInPlace(problem, partition, run, bits);
  if (!rows || !AreBitsBuffered(problem, partition)) return rows;
  GatherBits(problem, run, rows, buffer);
  return buffer;
}
TFOPS_INLINE void EndBits(const Problem&, const Partition&, const Run&, const uint8_t*, const uint8_t*) {}

// ---------------------------------------------------------------------------------------------------------------------
// The bits of a run's elements, a block or a few at a time.

// Bits i to i + n - 1 of a run, n <= 16. What follows them is undefined.
TFOPS_INLINE uint32_t LoadSomeBits(const uint8_t* run, int64_t i, int64_t n) {
  const int64_t first = i / 8, last = (i + n - 1) / 8;
  uint32_t bits = run[first];
  if (first < last) bits |= static_cast<uint32_t>(run[first + 1]) << 8;
  if (first + 1 < last) bits |= static_cast<uint32_t>(run[last]) << 16;
  return bits >> (i % 8);
}

// Bits i to i + kCount - 1. kInPlace: i is a multiple of 8; else kCount is 32 at most.
template <int64_t kCount, bool kInPlace>
TFOPS_INLINE uint64_t LoadBlockOfBits(const uint8_t* run, int64_t i) {
  uint64_t bits = 0;
  std::memcpy(&bits, run + i / 8, kCount / 8);
  if constexpr (!kInPlace) {
    static_assert(kCount <= 32);
    if (i % 8 != 0) bits |= uint64_t{run[(i + kCount) / 8]} << kCount;
    bits >>= i % 8;
  }
  return bits;
}

// Writes the bits of a run as they come: some, whole blocks of them, and some again. Without an array for them there
// are no blocks, and nothing is written.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* bits) : next_(bits) {}

  // The first n <= kBlock of these, not more than 63 before the end or the next block.
  TFOPS_INLINE void PutFirst(uint32_t bits, int64_t n) {
    pending_ |= static_cast<uint64_t>(bits & ((1u << n) - 1)) << count_;
    count_ += n;
  }
  // A block of kBits. kIsFirst: PutFirst has not been called; else a block has 32 bits at most.
  template <bool kIsFirst, int64_t kBits>
  TFOPS_INLINE void PutBlock(uint64_t bits) {
    if constexpr (!kIsFirst) {
      static_assert(kBits <= 32);
      pending_ |= bits << count_;
      bits = pending_;
      pending_ >>= kBits;
    }
    std::memcpy(next_, &bits, kBits / 8);
    next_ += kBits / 8;
  }
  TFOPS_INLINE void Finish() {
    if (next_) std::memcpy(next_, &pending_, static_cast<size_t>(count_ + 7) / 8);
  }

 private:
  uint8_t* next_;
  uint64_t pending_ = 0;
  int64_t count_ = 0;  // of pending bits
};

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_ACTIVATION_BITS_H_
