// y = act((x - mean) * slope + offset + residual), and the activation bits: run by run.

#ifndef TFOPS_BATCH_NORM_CPU_NORMALIZE_PASS_H_
#define TFOPS_BATCH_NORM_CPU_NORMALIZE_PASS_H_

#include "csrc/batch_norm/cpu/elements.h"
#include "csrc/batch_norm/cpu/runs.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// The arrays of one run. residual and bits may be null; A is AnyArrays, or says which are not.
template <typename T, typename A>
struct NormalizeArrays {
  const T* x;
  const T* residual;
  T* y;
  uint8_t* bits;
  bool stream;
  int64_t x_ahead;
  int64_t residual_ahead;

  TFOPS_INLINE bool HasResidual() const { return A::kAreKnown ? A::kHasResidual : residual != nullptr; }
  TFOPS_INLINE bool HasBits() const { return A::kAreKnown ? A::kHasBits : bits != nullptr; }
  TFOPS_INLINE bool IsStreamed() const { return !A::kAreCached && stream; }

  // Those of elements i and on. With bits, i is a multiple of 8.
  TFOPS_INLINE NormalizeArrays From(int64_t i) const {
    return {x + i, Advance(residual, i), y + i, Advance(bits, i / 8), stream, x_ahead, residual_ahead};
  }

  // The same, as arrays of which nothing is known.
  TFOPS_INLINE NormalizeArrays<T, AnyArrays> Forgotten() const {
    return {x, residual, y, bits, stream, x_ahead, residual_ahead};
  }
};

template <typename T, typename A>
TFOPS_INLINE NormalizeArrays<T, A> ArraysOfRun(const ForwardJob& job, const Run& run, uint8_t* bits) {
  const ForwardArrays& arrays = job.arrays;
  return {static_cast<const T*>(arrays.x) + run.offset,
          Advance(static_cast<const T*>(arrays.residual), run.offset),
          static_cast<T*>(arrays.y) + run.offset,
          bits,
          job.stream_y,
          job.x_ahead,
          job.residual_ahead};
}

// Calls body with what is known of the job's arrays. Tiles that are streamed know nothing of them.
// There are activation bits only with a residual.
template <Activation kActivation, Traversal kTraversal = Traversal::kNone, typename Body>
TFOPS_INLINE void WithArraysOf(const ForwardJob& job, Body body) {
  if constexpr (kTraversal == Traversal::kStreamed) {
    body(AnyArrays());
  } else {
    const bool cached = !job.stream_y && job.x_ahead == 0 && job.residual_ahead == 0;
    WithCached<kTraversal>(cached, [&](auto is_cached) {
      constexpr bool kCached = decltype(is_cached)::value;
      if (!job.arrays.residual) return body(KnownArrays<kCached, false, false>());
      if constexpr (kIsPiecewiseLinear<kActivation>) {
        if (job.arrays.activation_bits) return body(KnownArrays<kCached, true, true>());
      }
      body(KnownArrays<kCached, true, false>());
    });
  }
}

// For a pass that is about to read the vector at i, and will go on from there.
template <typename T, typename A>
TFOPS_INLINE void FetchAhead(const NormalizeArrays<T, A>& arrays, int64_t i) {
  if constexpr (A::kAreCached) return;
  FetchAhead(arrays.x + i, arrays.x_ahead);
  FetchAhead(Advance(arrays.residual, i), arrays.residual_ahead);
}

// What a vector of results is computed from.
template <typename P>
struct NormalizeInputs {
  Vec<P> x;
  Vec<P> residual;
};

// Lanes i to i + lanes of a run, or the first n of them if kPartial.
template <bool kPartial, typename T, typename A>
TFOPS_INLINE NormalizeInputs<Param<T>> LoadInputs(const NormalizeArrays<T, A>& arrays, int64_t i, int64_t n) {
  const Vec<Param<T>> x = LoadLanes<kPartial>(arrays.x + i, n);
  return {x, arrays.HasResidual() ? LoadLanes<kPartial>(arrays.residual + i, n) : Vec<Param<T>>{}};
}

// What the activation is of.
template <typename T, typename A, typename C>
TFOPS_INLINE Vec<Param<T>> BeforeActivation(const NormalizeArrays<T, A>& arrays,
                                            const NormalizeInputs<Param<T>>& inputs, const C& coefficients, int64_t i) {
  using V = Vec<Param<T>>;
  const V z = Affine<V>(inputs.x - coefficients.Mean(i), coefficients.Slope(i), coefficients.Offset(i));
  return arrays.HasResidual() ? z + inputs.residual : z;
}

// The activation bits of a vector, if there are any.
template <Activation kActivation, typename T, typename A>
TFOPS_INLINE uint32_t BitsOf(const NormalizeArrays<T, A>& arrays, Vec<Param<T>> z) {
  if constexpr (kIsPiecewiseLinear<kActivation>) {
    if (arrays.HasBits()) return BitsFromMask<Param<T>>(IsOn<kActivation>(z));
  }
  return 0;
}

// Writes the results of these. Returns their bits.
template <bool kPartial, Activation kActivation, typename T, typename A, typename C>
TFOPS_INLINE uint32_t NormalizeLoaded(const NormalizeArrays<T, A>& arrays, const NormalizeInputs<Param<T>>& inputs,
                                      const C& coefficients, int64_t i, int64_t n, bool stream) {
  const Vec<Param<T>> z = BeforeActivation(arrays, inputs, coefficients, i);
  StoreLanes<kPartial>(arrays.y + i, Encode<T>(Activate<kActivation>(z)), n, stream);
  return BitsOf<kActivation>(arrays, z);
}

template <bool kPartial, Activation kActivation, typename T, typename A, typename C>
TFOPS_INLINE uint32_t NormalizeVector(const NormalizeArrays<T, A>& arrays, const C& coefficients, int64_t i, int64_t n,
                                      bool stream) {
  const auto inputs = LoadInputs<kPartial>(arrays, i, n);
  return NormalizeLoaded<kPartial, kActivation>(arrays, inputs, coefficients, i, n, stream);
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
  // So many bits: whole blocks, no more than there are in a word. kIsFirst: if PutFirst has not been called.
  template <bool kIsFirst, int64_t kBits>
  TFOPS_INLINE void PutBlocks(uint32_t bits) {
    if (!kIsFirst) {
      pending_ |= static_cast<uint64_t>(bits) << count_;
      bits = static_cast<uint32_t>(pending_);
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

// A part of a run, in vectors of which some may be written in part.
template <Activation kActivation, typename T, typename A, typename C>
TFOPS_INLINE void NormalizeSome(const NormalizeArrays<T, A>& arrays, const C& coefficients, int64_t begin, int64_t end,
                                BitWriter* bit_writer) {
  for (int64_t i = begin, n; i < end; i += n) {
    n = Min(kLanes<Param<T>>, end - i);
    bit_writer->PutFirst(NormalizeVector<true, kActivation>(arrays, coefficients, i, n, false), n);
  }
}

// What is no whole cache line, at either end of what is streamed. Out of line and of any arrays, for there is little.
template <Activation kActivation, typename T, typename C>
__attribute__((noinline)) void NormalizeOutsideLines(const NormalizeArrays<T, AnyArrays> arrays, const C coefficients,
                                                     int64_t begin, int64_t end, BitWriter* bit_writer) {
  NormalizeSome<kActivation>(arrays, coefficients, begin, end, bit_writer);
}

// Whole blocks, whose variables are locals of their own, which so stay in registers.
// Returns where they end.
template <Activation kActivation, typename T, typename A, typename C>
TFOPS_INLINE int64_t NormalizeBlocks(const NormalizeArrays<T, A> arrays, const C coefficients, int64_t begin,
                                     int64_t end, BitWriter* bit_writer) {
  constexpr int kL = kLanes<Param<T>>;
  BitWriter writer = *bit_writer;
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) {
    uint32_t bits = 0;
    for (int j = 0; j < kBlock; j += kL) {
      FetchAhead(arrays, i + j);
      bits |= NormalizeVector<false, kActivation>(arrays, coefficients, i + j, kL, false) << j;
    }
    if (kIsPiecewiseLinear<kActivation> && arrays.HasBits()) writer.template PutBlocks<true, kBlock>(bits);
  }
  *bit_writer = writer;
  return i;
}

// Likewise past the cache, kCount elements at a time, which are written when all of them are computed: a cache line's
// parts are to follow one another.
template <Activation kActivation, int64_t kCount, typename T, typename A, typename C>
TFOPS_INLINE int64_t StreamBlocks(const NormalizeArrays<T, A> arrays, const C coefficients, int64_t begin, int64_t end,
                                  BitWriter* bit_writer) {
  using P = Param<T>;
  constexpr int kL = kLanes<P>;
  constexpr int kVectors = static_cast<int>(kCount / kL);
  constexpr bool kMayHaveBits = kIsPiecewiseLinear<kActivation> && (!A::kAreKnown || A::kHasBits);
  BitWriter writer = *bit_writer;
  int64_t i = begin;
  for (; i + kCount <= end; i += kCount) {
    Vec<P> z[kVectors];
    uint32_t bits = 0;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = i + v * kL;
      if (v * kL % kLineElements<T> == 0) FetchAhead(arrays, at);
      z[v] = BeforeActivation(arrays, LoadInputs<false>(arrays, at, kL), coefficients, at);
      if constexpr (kMayHaveBits) bits |= BitsOf<kActivation>(arrays, z[v]) << v * kL;
    }
    for (int v = 0; v < kVectors; ++v) StreamBits(arrays.y + i + v * kL, Encode<T>(Activate<kActivation>(z[v])));
    if constexpr (kMayHaveBits) {
      if (arrays.HasBits()) writer.template PutBlocks<false, kCount>(bits);
    }
  }
  *bit_writer = writer;
  return i;
}

// How many elements to stream at a time: a cache line's. Several lines', if x is all that is read and coefficients are
// loaded: a core that goes from reading to writing and back at each line, and does little else, is slower than one that
// takes its time.
template <typename T, typename A, typename C>
constexpr int64_t ElementsToStream() {
  constexpr int64_t kMost = Min(64, 8 * kLanes<Param<T>>);
  const bool is_x_alone = A::kAreKnown && !A::kHasResidual;
  return is_x_alone && C::kAreLoaded && sizeof(T) < sizeof(double) ? kMost : kLineElements<T>;
}

template <Activation kActivation, typename T, typename A, typename C>
TFOPS_INLINE void NormalizeRun(const NormalizeArrays<T, A>& arrays, const C& coefficients, int64_t length) {
  constexpr int kL = kLanes<Param<T>>;
  BitWriter bit_writer(kIsPiecewiseLinear<kActivation> && arrays.HasBits() ? arrays.bits : nullptr);
  const StreamedLines lines = arrays.IsStreamed() ? LinesToStream(arrays.y, length) : StreamedLines{};
  if (!lines.IsEmpty()) {
    const auto normalize_outside = [&](int64_t begin, int64_t end) {
      if (begin < end) NormalizeOutsideLines<kActivation, T>(arrays.Forgotten(), coefficients, begin, end, &bit_writer);
    };
    normalize_outside(0, lines.begin);
    int64_t i = lines.begin;
    constexpr int64_t kMost = ElementsToStream<T, A, C>();
    if constexpr (kMost > kBlock) i = StreamBlocks<kActivation, kMost>(arrays, coefficients, i, lines.end, &bit_writer);
    StreamBlocks<kActivation, kBlock>(arrays, coefficients, i, lines.end, &bit_writer);
    normalize_outside(lines.end, length);
    return bit_writer.Finish();
  }
  // The last vector may overlap the one before. So it is loaded before that is written, perhaps to the same place: of
  // short runs first of all, of others when all but what it overlaps is written.
  const bool overlaps = OverlapsItsEnd<T>(length), at_once = IsReadAtOnce<T>(length);
  const int64_t last = length - kL;
  NormalizeInputs<Param<T>> inputs{};
  if (overlaps && at_once) inputs = LoadInputs<false>(arrays, last, kL);
  int64_t i = NormalizeBlocks<kActivation>(arrays, coefficients, 0, overlaps && !at_once ? last : length, &bit_writer);
  if (overlaps) {
    if (!at_once) inputs = LoadInputs<false>(arrays, last, kL);
    for (; i < last; i += kL) {
      bit_writer.PutFirst(NormalizeVector<false, kActivation>(arrays, coefficients, i, kL, false), kL);
    }
    const uint32_t bits = NormalizeLoaded<false, kActivation>(arrays, inputs, coefficients, last, kL, false);
    bit_writer.PutFirst(bits >> (i - last), length - i);
  } else {
    NormalizeSome<kActivation>(arrays, coefficients, i, length, &bit_writer);
  }
  bit_writer.Finish();
}

// What tiles leave over: `length` elements of each of so many rows. Out of line and of any arrays, for all traversals
// have some, and little of it.
template <Activation kActivation, typename T>
__attribute__((noinline)) void NormalizeRest(const NormalizeArrays<T, AnyArrays> arrays,
                                             const ColumnCoefficients<Param<T>> coefficients, int64_t rows,
                                             int64_t stride, int64_t length) {
  for (int64_t r = 0; r < rows; ++r) NormalizeRun<kActivation>(arrays.From(r * stride), coefficients, length);
}

// kTileRows rows, `stride` elements from one to the next: these are the first's arrays.
template <Activation kActivation, Traversal kTraversal, typename T, typename A>
TFOPS_INLINE void NormalizeTiles(const NormalizeArrays<T, A> arrays, const ColumnCoefficients<Param<T>> coefficients,
                                 int64_t stride, int64_t length) {
  using P = Param<T>;
  constexpr int kL = kLanes<P>;
  int64_t i = 0;
  for (; i + kTileColumns<T> <= length; i += kTileColumns<T>) {
    VectorCoefficients<P> loaded[kTileVectors<T>];
    for (int v = 0; v < kTileVectors<T>; ++v) loaded[v] = coefficients.template Loaded</*kAll=*/false>(i + v * kL);
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t at = r * stride + i;
      const bool stream = kTraversal == Traversal::kStreamed && arrays.IsStreamed();
      uint64_t bits = 0;
      for (int v = 0; v < kTileVectors<T>; ++v) {
        bits |= uint64_t{NormalizeVector<false, kActivation>(arrays, loaded[v], at + v * kL, kL, stream)} << v * kL;
      }
      if (kIsPiecewiseLinear<kActivation> && arrays.HasBits()) {
        std::memcpy(arrays.bits + at / 8, &bits, kTileColumns<T> / 8);
      }
    }
  }
  if (i < length) {
    NormalizeRest<kActivation>(arrays.From(i).Forgotten(), coefficients.From(i), kTileRows, stride, length - i);
  }
}

template <Traversal kTraversal, typename T>
void NormalizeTiledItem(const ForwardJob& job, int64_t item) {
  const TileRows rows = TileRowsOfItem<T>(job.partition, item);
  uint8_t* bits = BitsInPlace(job.problem, job.partition, rows.first, job.arrays.activation_bits);
  const ColumnCoefficients<Param<T>> coefficients(job.coefficients, rows.first.column);
  WithActivation(job.problem.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    WithArraysOf<kActivation, kTraversal>(job, [&](auto known) {
      const auto arrays = ArraysOfRun<T, decltype(known)>(job, rows.first, bits);
      const auto normalize_tiles = [&](int64_t offset, int64_t stride) {
        NormalizeTiles<kActivation, kTraversal>(arrays.From(offset), coefficients, stride, rows.first.length);
      };
      ForEachTileRows(rows, normalize_tiles, [&](int64_t offset, int64_t count, int64_t length) {
        NormalizeRest<kActivation>(arrays.From(offset).Forgotten(), coefficients, count, rows.stride, length);
      });
    });
  });
  if (job.stream_y) StreamFence();
}

template <typename T>
void NormalizeItem(const ForwardJob& job, int64_t item) {
  using P = Param<T>;
  const Problem& problem = job.problem;
  const Partition& partition = job.partition;
  const auto normalize_tiled = [&](auto traversal) { NormalizeTiledItem<decltype(traversal)::value, T>(job, item); };
  if (WithTraversal<T>(job.traversal, partition, normalize_tiled)) return;
  uint8_t* activation_bits = job.arrays.activation_bits;
  const bool buffered = activation_bits && AreBitsBuffered(problem, partition);
  WithActivation(problem.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    WithArraysOf<kActivation>(job, [&](auto known) {
      using A = decltype(known);
      if (!partition.channels_last) {
        return ForEachSegment(problem, partition, item, [&](const Run& run) {
          const auto arrays = ArraysOfRun<T, A>(job, run, BitsInPlace(problem, partition, run, activation_bits));
          NormalizeRun<kActivation>(arrays, ChannelCoefficients<P>(job.coefficients, run.column), run.length);
        });
      }
      ForEachRow(partition, item, [&](const Run& run) {
        uint8_t buffer[kRunBitsBytes];
        uint8_t* rows = BitsInPlace(problem, partition, run, activation_bits);
        const auto arrays = ArraysOfRun<T, A>(job, run, buffered ? buffer : rows);
        NormalizeRun<kActivation>(arrays, ColumnCoefficients<P>(job.coefficients, run.column), run.length);
        if (buffered) ScatterBits(problem, run, buffer, rows);
      });
    });
  });
  if (job.stream_y) StreamFence();
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_NORMALIZE_PASS_H_
