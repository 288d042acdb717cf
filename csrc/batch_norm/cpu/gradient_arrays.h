// What the two passes of the gradient read and write, and dz of a vector.

#ifndef TFOPS_BATCH_NORM_CPU_GRADIENT_ARRAYS_H_
#define TFOPS_BATCH_NORM_CPU_GRADIENT_ARRAYS_H_

#include "csrc/batch_norm/cpu/elements.h"
#include "csrc/batch_norm/cpu/runs.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// The arrays of one run. residual, bits, dresidual and, where only sums are wanted, dx may be null; A is AnyArrays, or
// says that there is no residual, and whether there are bits and dresidual: training has either both or neither, with
// few exceptions.
template <typename T, typename A>
struct GradientArrays {
  const T* dy;
  const T* x;
  const T* residual;
  const uint8_t* bits;
  int64_t length;
  T* dx;
  T* dresidual;
  bool stream_dx;
  bool stream_dresidual;
  int64_t ahead;

  TFOPS_INLINE bool HasResidual() const { return !A::kAreKnown && residual != nullptr; }
  TFOPS_INLINE bool HasBits() const { return A::kAreKnown ? A::kHasBits : bits != nullptr; }
  TFOPS_INLINE bool HasDresidual() const { return A::kAreKnown ? A::kHasBits : dresidual != nullptr; }
  TFOPS_INLINE bool IsDxStreamed() const { return !A::kAreCached && stream_dx; }
  TFOPS_INLINE bool IsDresidualStreamed() const { return !A::kAreCached && stream_dresidual; }

  // Those of `count` elements from i on. With bits, i is a multiple of 8.
  TFOPS_INLINE GradientArrays From(int64_t i, int64_t count) const {
    return {dy + i,
            x + i,
            Advance(residual, i),
            Advance(bits, i / 8),
            count,
            Advance(dx, i),
            Advance(dresidual, i),
            stream_dx,
            stream_dresidual,
            ahead};
  }

  // The same, as arrays of which nothing is known.
  TFOPS_INLINE GradientArrays<T, AnyArrays> Forgotten() const {
    return {dy, x, residual, bits, length, dx, dresidual, stream_dx, stream_dresidual, ahead};
  }
};

template <typename T, typename A>
TFOPS_INLINE GradientArrays<T, A> ArraysOfRun(const BackwardJob& job, const Run& run, const uint8_t* bits,
                                              int64_t ahead) {
  const BackwardArrays& arrays = job.arrays;
  return {static_cast<const T*>(arrays.dy) + run.offset,
          static_cast<const T*>(arrays.x) + run.offset,
          Advance(static_cast<const T*>(arrays.residual), run.offset),
          bits,
          run.length,
          Advance(static_cast<T*>(arrays.dx), run.offset),
          Advance(static_cast<T*>(arrays.dresidual), run.offset),
          job.stream_dx,
          job.stream_dresidual,
          ahead};
}

// Calls body with whether there are activation bits, and whether the arrays are cached, as constants.
template <Activation kActivation, Traversal kTraversal, typename Body>
TFOPS_INLINE void WithBitsOf(const BackwardJob& job, bool cached, Body body) {
  WithCached<kTraversal>(cached, [&](auto is_cached) {
    constexpr bool kCached = decltype(is_cached)::value;
    if constexpr (kIsPiecewiseLinear<kActivation>) {
      if (job.arrays.activation_bits) return body(KnownArrays<kCached, false, true>());
    }
    body(KnownArrays<kCached, false, false>());
  });
}

// Calls body with what is known of the arrays that the job's sums read.
template <Activation kActivation, typename Body>
TFOPS_INLINE void WithArraysOfSums(const BackwardJob& job, Body body) {
  if (job.arrays.residual) return body(AnyArrays());
  WithBitsOf<kActivation, Traversal::kNone>(job, job.sums_ahead == 0, body);
}

// Likewise of those that dx and dresidual are computed from and written to; as WithArraysOf in normalize_pass.h. They
// are known in training alone.
template <Activation kActivation, Traversal kTraversal = Traversal::kNone, typename Body>
TFOPS_INLINE void WithArraysOfDx(const BackwardJob& job, Body body) {
  if constexpr (kTraversal == Traversal::kStreamed) {
    body(AnyArrays());
  } else {
    const bool has_bits = kIsPiecewiseLinear<kActivation> && job.arrays.activation_bits;
    if (!job.problem.training || job.arrays.residual || has_bits != (job.arrays.dresidual != nullptr)) {
      return body(AnyArrays());
    }
    const bool cached = job.dx_ahead == 0 && !job.stream_dx && !job.stream_dresidual;
    WithBitsOf<kActivation, kTraversal>(job, cached, body);
  }
}

// For a pass that is about to read the vector at i, and will go on from there.
template <typename T, typename A>
TFOPS_INLINE void FetchAhead(const GradientArrays<T, A>& arrays, int64_t i) {
  if (A::kAreCached || arrays.ahead == 0) return;
  FetchAhead(arrays.dy + i, arrays.ahead);
  FetchAhead(arrays.x + i, arrays.ahead);
  if (arrays.HasResidual()) FetchAhead(arrays.residual + i, arrays.ahead);
}

template <typename P>
struct Gradient {
  Vec<P> dz;
  Vec<P> xc;
};

// dresidual's elements: dz, which is dy or 0 where slopes are 1 and 0.
template <Activation kActivation, typename T>
TFOPS_INLINE Stored<T> EncodeDz(Vec<Param<T>> dz) {
  if constexpr (kActivation == Activation::kRelu || kActivation == Activation::kRelu6) return EncodeExact<T>(dz);
  return Encode<T>(dz);
}

// Lanes i to i + lanes of a run, or the first n of them (and zero dz) if kPartial; of the bits from the first on, if
// there are any.
template <bool kPartial, Activation kActivation, typename T, typename A, typename C>
TFOPS_INLINE Gradient<Param<T>> GradientOfBits(const GradientArrays<T, A>& arrays, const C& coefficients, int64_t i,
                                               int64_t n, uint32_t bits, int first_bit = 0) {
  using P = Param<T>;
  const Vec<P> dy = LoadLanes<kPartial>(arrays.dy + i, n);
  const Vec<P> xc = LoadLanes<kPartial>(arrays.x + i, n) - coefficients.Mean(i);
  if constexpr (kActivation == Activation::kNone) return {dy, xc};
  if constexpr (kIsPiecewiseLinear<kActivation>) {
    if (arrays.HasBits()) {
      const IntVec<P> on = MaskFromBits<P>(bits, first_bit);
      return {on ? dy : OffGradient<kActivation>(dy), xc};
    }
  }
  Vec<P> z = Affine<Vec<P>>(xc, coefficients.Slope(i), coefficients.Offset(i));
  if (arrays.HasResidual()) z += LoadLanes<kPartial>(arrays.residual + i, n);
  return {ActivationGradient<kActivation>(dy, z), xc};
}

// Likewise, of the bits that lie there. kInPlace: see LoadActivationBits.
template <bool kPartial, Activation kActivation, bool kInPlace = !kPartial, typename T, typename A, typename C>
TFOPS_INLINE Gradient<Param<T>> GradientOfVector(const GradientArrays<T, A>& arrays, const C& coefficients, int64_t i,
                                                 int64_t n) {
  uint32_t bits = 0;
  if constexpr (kIsPiecewiseLinear<kActivation>) {
    if (arrays.HasBits()) bits = LoadActivationBits<Param<T>, kInPlace>(arrays.bits, i, n);
  }
  return GradientOfBits<kPartial, kActivation>(arrays, coefficients, i, n, bits);
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_GRADIENT_ARRAYS_H_
