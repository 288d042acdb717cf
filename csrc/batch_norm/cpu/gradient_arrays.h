// What the two passes of the gradient read and write, and dz of a vector.

#ifndef TFOPS_BATCH_NORM_CPU_GRADIENT_ARRAYS_H_
#define TFOPS_BATCH_NORM_CPU_GRADIENT_ARRAYS_H_

#include "csrc/batch_norm/cpu/elements.h"
#include "csrc/batch_norm/cpu/runs.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// The arrays of one run. residual, bits, dresidual and, where only sums are wanted, dx may be null.
template <typename T>
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
};

template <typename T>
TFOPS_INLINE GradientArrays<T> ArraysOfRun(const BackwardJob& job, const Run& run, const uint8_t* bits, int64_t ahead) {
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

// The same, without residual, nothing of them fetched ahead, and where it is known whether there is a mask.
template <bool kHasMask, typename T>
TFOPS_INLINE GradientArrays<T> WithKnownMask(GradientArrays<T> arrays) {
  arrays.residual = nullptr;
  arrays.bits = Known<kHasMask>(arrays.bits);
  arrays.ahead = 0;
  return arrays;
}

// Calls body with the arrays of these runs, in which there are the same ones: as constants if, as mostly, they are as
// above. For sums.
template <Activation kActivation, int kRuns, typename T, typename Body>
TFOPS_INLINE void WithKnown(const GradientArrays<T> (&runs)[kRuns], Body body) {
  if (runs[0].ahead != 0 || runs[0].residual) return body(runs);
  WithConstant(kIsPiecewiseLinear<kActivation> && runs[0].bits, [&](auto has_mask) {
    GradientArrays<T> known[kRuns];
    for (int r = 0; r < kRuns; ++r) known[r] = WithKnownMask<decltype(has_mask)::value>(runs[r]);
    body(known);
  });
}

// Likewise body(arrays, training), for dx, with a mask and dresidual or with neither.
template <Activation kActivation, typename T, typename Body>
TFOPS_INLINE auto WithKnown(const GradientArrays<T>& arrays, bool training, Body body) {
  const bool has_mask = kIsPiecewiseLinear<kActivation> && arrays.bits;
  if (!training || arrays.ahead != 0 || arrays.residual || has_mask != (arrays.dresidual != nullptr)) {
    return body(arrays, training);
  }
  return WithConstant(has_mask, [&](auto constant) {
    GradientArrays<T> known = WithKnownMask<decltype(constant)::value>(arrays);
    known.dresidual = Known<decltype(constant)::value>(arrays.dresidual);
    return body(known, true);
  });
}

// For a pass that is about to read the vector at i, and will go on from there.
template <typename T>
TFOPS_INLINE void FetchAhead(const GradientArrays<T>& arrays, int64_t i) {
  if (arrays.ahead == 0) return;
  FetchAhead(arrays.dy + i, arrays.ahead);
  FetchAhead(arrays.x + i, arrays.ahead);
  if (arrays.residual) FetchAhead(arrays.residual + i, arrays.ahead);
}

template <typename P>
struct Gradient {
  Vec<P> dz;
  Vec<P> xc;
};

// Lanes i to i + lanes of a run, or the first n of them (and zero dz) if kPartial. kInPlace: see LoadMaskBits.
template <bool kPartial, Activation kActivation, bool kInPlace = !kPartial, typename T, typename C>
TFOPS_INLINE Gradient<Param<T>> GradientOfVector(const GradientArrays<T>& arrays, const C& coefficients, int64_t i,
                                                 int64_t n) {
  using P = Param<T>;
  const Vec<P> dy = LoadLanes<kPartial>(arrays.dy + i, n);
  const Vec<P> xc = LoadLanes<kPartial>(arrays.x + i, n) - coefficients.Mean(i);
  if constexpr (kActivation == Activation::kNone) return {dy, xc};
  if constexpr (kIsPiecewiseLinear<kActivation>) {
    if (arrays.bits) {
      const IntVec<P> on = MaskFromBits<P>(LoadMaskBits<P, kInPlace>(arrays.bits, i, n));
      return {on ? dy : OffGradient<kActivation>(dy), xc};
    }
  }
  Vec<P> z = Affine<Vec<P>>(xc, coefficients.Slope(i), coefficients.Offset(i));
  if (arrays.residual) z += LoadLanes<kPartial>(arrays.residual + i, n);
  return {ActivationGradient<kActivation>(dy, z), xc};
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_GRADIENT_ARRAYS_H_
