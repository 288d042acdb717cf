// y = act((x - mean) * slope + offset + residual), and the mask: run by run.

#ifndef TFOPS_BATCH_NORM_CPU_NORMALIZE_PASS_H_
#define TFOPS_BATCH_NORM_CPU_NORMALIZE_PASS_H_

#include "csrc/batch_norm/cpu/elements.h"
#include "csrc/batch_norm/cpu/runs.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// The arrays of one run. residual and bits may be null.
template <typename T>
struct NormalizeArrays {
  const T* x;
  const T* residual;
  T* y;
  uint8_t* bits;
  bool stream;
};

// What a vector of results is computed from.
template <typename P>
struct NormalizeInputs {
  Vec<P> x;
  Vec<P> residual;
};

// Lanes i to i + lanes of a run, or the first n of them if kPartial.
template <bool kPartial, typename T>
TFOPS_INLINE NormalizeInputs<Param<T>> LoadInputs(const NormalizeArrays<T>& arrays, int64_t i, int64_t n) {
  const Vec<Param<T>> x = LoadLanes<kPartial>(arrays.x + i, n);
  return {x, arrays.residual ? LoadLanes<kPartial>(arrays.residual + i, n) : Vec<Param<T>>{}};
}

// Writes the results of these. Returns their bits.
template <bool kPartial, Activation kActivation, typename T, typename C>
TFOPS_INLINE uint32_t NormalizeLoaded(const NormalizeArrays<T>& arrays, const NormalizeInputs<Param<T>>& inputs,
                                      const C& coefficients, int64_t i, int64_t n, bool stream) {
  using P = Param<T>;
  Vec<P> z = Affine<Vec<P>>(inputs.x - coefficients.Mean(i), coefficients.Slope(i), coefficients.Offset(i));
  if (arrays.residual) z += inputs.residual;
  StoreLanes<kPartial>(arrays.y + i, Activate<kActivation>(z), n, stream);
  if constexpr (kIsPiecewiseLinear<kActivation>) {
    if (arrays.bits) return BitsFromMask<P>(IsOn<kActivation>(z));
  }
  return 0;
}

template <bool kPartial, Activation kActivation, typename T, typename C>
TFOPS_INLINE uint32_t NormalizeVector(const NormalizeArrays<T>& arrays, const C& coefficients, int64_t i, int64_t n,
                                      bool stream) {
  const auto inputs = LoadInputs<kPartial>(arrays, i, n);
  return NormalizeLoaded<kPartial, kActivation>(arrays, inputs, coefficients, i, n, stream);
}

// Writes the bits of a run as they come: some, whole blocks of them, and some again. Without an array for them,
// nothing.
class MaskWriter {
 public:
  explicit MaskWriter(uint8_t* bits) : next_(bits) {}

  // The first n <= kBlock of these, not more than 63 before the end or the next block.
  TFOPS_INLINE void PutFirst(uint32_t bits, int64_t n) {
    pending_ |= static_cast<uint64_t>(bits & ((1u << n) - 1)) << count_;
    count_ += n;
  }
  // kIsFirst: if PutFirst has not been called.
  template <bool kIsFirst>
  TFOPS_INLINE void PutBlock(uint32_t bits) {
    if (!next_) return;
    if (!kIsFirst) {
      pending_ |= static_cast<uint64_t>(bits) << count_;
      bits = static_cast<uint32_t>(pending_);
      pending_ >>= kBlock;
    }
    std::memcpy(next_, &bits, kBlock / 8);
    next_ += kBlock / 8;
  }
  TFOPS_INLINE void Finish() {
    if (next_) std::memcpy(next_, &pending_, static_cast<size_t>(count_ + 7) / 8);
  }

 private:
  uint8_t* next_;
  uint64_t pending_ = 0;
  int64_t count_ = 0;  // of pending bits
};

// Whether the end of a run is written by a vector that overlaps the one before. One written in part would do too, but
// what reads on from there, if it reads where that writes, waits for it: 8 ns, which in a plane of 7x7 is the larger
// part.
template <typename T>
TFOPS_INLINE bool OverlapsItsEnd(int64_t length) {
  constexpr int64_t kMaxBytes = 512;  // to read the end of longer runs first is bad for prefetching
  constexpr int kL = kLanes<Param<T>>;
  return length > kL && length % kL != 0 && length * static_cast<int64_t>(sizeof(T)) <= kMaxBytes;
}

template <Activation kActivation, typename T, typename C>
TFOPS_INLINE void NormalizeRun(const NormalizeArrays<T>& arrays, const C& coefficients, int64_t length) {
  constexpr int kL = kLanes<Param<T>>;
  MaskWriter mask(kIsPiecewiseLinear<kActivation> ? arrays.bits : nullptr);
  int64_t i = 0;
  const auto some = [&](int64_t end) {
    for (int64_t n; i < end; i += n) {
      n = Min(kL, end - i);
      mask.PutFirst(NormalizeVector<true, kActivation>(arrays, coefficients, i, n, false), n);
    }
  };
  const auto blocks = [&](auto stream, int64_t end) {
    constexpr bool kStream = decltype(stream)::value;
    for (; i + kBlock <= end; i += kBlock) {
      uint32_t bits = 0;
      for (int j = 0; j < kBlock; j += kL) {
        bits |= NormalizeVector<false, kActivation>(arrays, coefficients, i + j, kL, kStream) << j;
      }
      mask.template PutBlock<!kStream>(bits);
    }
  };
  const StreamedLines lines = arrays.stream ? LinesToStream(arrays.y, length) : StreamedLines{};
  if (!lines.IsEmpty()) {
    some(lines.begin);
    blocks(std::true_type(), lines.end);
  } else if (!OverlapsItsEnd<T>(length)) {
    blocks(std::false_type(), length);
  } else {
    // The last vector overlaps the one before, and so is loaded before that is written, perhaps to the same place.
    const int64_t last = length - kL;
    const auto inputs = LoadInputs<false>(arrays, last, kL);
    blocks(std::false_type(), length);
    for (; i < last; i += kL) {
      mask.PutFirst(NormalizeVector<false, kActivation>(arrays, coefficients, i, kL, false), kL);
    }
    const uint32_t bits = NormalizeLoaded<false, kActivation>(arrays, inputs, coefficients, last, kL, false);
    mask.PutFirst(bits >> (i - last), length - i);
    i = length;
  }
  some(length);
  mask.Finish();
}

// A folded row as kRows rows that share loads of coefficients: they are three a vector, and in the cache they are what
// takes time. Memory wants to be read in its order. Without residual, bits or stores past the cache.
template <Activation kActivation, int kRows, typename T>
TFOPS_INLINE void NormalizeFolded(const T* x, T* y, const ColumnCoefficients<Param<T>>& coefficients, int64_t length) {
  const NormalizeArrays<T> arrays{x, nullptr, y, nullptr, false};
  const int64_t columns = length / kRows;
  for (int64_t i = 0; i < columns; i += kLanes<Param<T>>) {
    const ChannelCoefficients<Param<T>> loaded(coefficients, i);
    for (int r = 0; r < kRows; ++r) {
      NormalizeVector<false, kActivation>(arrays, loaded, r * columns + i, kLanes<Param<T>>, false);
    }
  }
}

// Rows that a folded row may be seen as, by NormalizeFolded.
TFOPS_INLINE int64_t FoldedRows(const ForwardJob& job) {
  const Plan& plan = job.plan;
  if (!job.in_cache || job.arrays.residual || job.arrays.mask) return 1;
  for (const int64_t rows : {4, 2}) {
    if (plan.fold % rows == 0 && plan.columns / rows % kBlock == 0) return rows;
  }
  return 1;
}

template <typename T>
void NormalizeItem(const ForwardJob& job, int64_t item) {
  using P = Param<T>;
  const Problem& problem = job.problem;
  const Plan& plan = job.plan;
  const T* x = static_cast<const T*>(job.arrays.x);
  const T* residual = static_cast<const T*>(job.arrays.residual);
  T* y = static_cast<T*>(job.arrays.y);
  uint8_t* mask = job.arrays.mask;
  const bool buffered = mask && IsMaskBuffered(problem, plan);
  const int64_t folded_rows = FoldedRows(job);
  WithActivation(problem.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    ForEachRun(problem, plan, item, [&](const Run& run) {
      uint8_t buffer[kRunMaskBytes];
      uint8_t* bits = buffered ? buffer : MaskInPlace(problem, plan, run, mask);
      const NormalizeArrays<T> arrays{x + run.offset, residual ? residual + run.offset : nullptr, y + run.offset, bits,
                                      job.stream_y};
      if (plan.channels_last) {
        const ColumnCoefficients<P> coefficients(job.coefficients, run.column);
        if (folded_rows > 1 && run.length == plan.columns) {
          return folded_rows == 4 ? NormalizeFolded<kActivation, 4>(arrays.x, arrays.y, coefficients, run.length)
                                  : NormalizeFolded<kActivation, 2>(arrays.x, arrays.y, coefficients, run.length);
        }
        NormalizeRun<kActivation>(arrays, coefficients, run.length);
      } else {
        NormalizeRun<kActivation>(arrays, ChannelCoefficients<P>(job.coefficients, run.column), run.length);
      }
      if (buffered) ScatterMask(problem, plan, run, buffer, mask);
    });
  });
  if (job.stream_y) StreamFence();
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_NORMALIZE_PASS_H_
