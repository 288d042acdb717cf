// What the two passes of the gradient read, and dz of a vector, which both compute.

#ifndef TFOPS_BATCH_NORM_CPU_GRADIENT_H_
#define TFOPS_BATCH_NORM_CPU_GRADIENT_H_

#include "csrc/batch_norm/cpu/activation_bits.h"
#include "csrc/batch_norm/cpu/coefficients.h"
#include "csrc/batch_norm/cpu/known.h"
#include "csrc/batch_norm/cpu/vector_activation.h"
#include "csrc/batch_norm/in_place.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// The arrays of a run. residual and bits may be null; K is Unknown, or says that there is no residual, and whether
// there are bits.
template <typename T, typename K>
struct GradientInputs {
  using Element = T;
  using P = Param<T>;
  using Knows = K;
  using Input = Gradient<P>;
  static constexpr int kL = kLanes<P>;

  const T* dy;
  const T* x;
  const T* residual;
  const uint8_t* bits;
  ActivationIn<P> activation;
  int64_t ahead;

  GradientInputs() = default;
  TFOPS_INLINE GradientInputs(const BackwardJob& job, const Run& run, const uint8_t* bits, int64_t ahead)
      : dy(At<const T>(job.arrays.dy, run)),
        x(At<const T>(job.arrays.x, run)),
        residual(At<const T>(job.arrays.residual, run)),
        bits(bits),
        activation(job.problem),
        ahead(ahead) {}

  TFOPS_INLINE bool HasBits() const { return K::kIsKnown ? K::kHasBits : bits != nullptr; }
  TFOPS_INLINE void StopFetching() { ahead = 0; }

  // For a pass that is about to read the vector at i, and will go on from there.
  TFOPS_INLINE void Fetch(int64_t i) const {
    if (K::kIsCached || ahead == 0) return;
    FetchAhead(dy + i, ahead);
    FetchAhead(x + i, ahead);
    if (!K::kIsKnown && residual) FetchAhead(residual + i, ahead);
  }
  // In a pass that sums rows, cores see the next ones coming if there is little to compute.
  TFOPS_INLINE void FetchRow(int64_t i) const {
    if (!K::kIsKnown || K::kActivation != Activation::kNone) Fetch(i);
  }

  // Elements i to i + n, all lanes or (with zero dy in the others) fewer, whose bits are the first of `word`. Unless
  // the activation is known, Finish has to make dz of dy.
  template <bool kPartial, typename C>
  TFOPS_INLINE Gradient<P> ReadWith(uint32_t word, const C& c, int64_t column, int64_t i, int64_t n) const {
    const Vec<P> dy_i = LoadLanes<kPartial>(dy + i, n);
    if constexpr (K::kIsInPlace) return FromResult(dy_i, LoadLanes<kPartial>(x + i, n), c, column);
    const Vec<P> xc = LoadLanes<kPartial>(x + i, n) - c.Get(kMean, column);
    if constexpr (K::kIsKnown && K::kActivation == Activation::kNone) return {dy_i, xc, Vec<P>{}};
    if (HasBits()) {
      const IntVec<P> on = MaskFromBits<P>(word);
      if constexpr (K::kIsKnown) return {on ? dy_i : OffGradient<K::kActivation>(dy_i, activation), xc, Vec<P>{}};
      return {dy_i, xc, on ? Splat<P>(1) : Splat<P>(-1)};  // a z where the slope is what it is at the real one
    }
    Vec<P> z = Affine<P>(xc, c, column);
    if (!K::kIsKnown && residual) z += LoadLanes<kPartial>(residual + i, n);
    if constexpr (K::kIsKnown) return {ActivationGradient<K::kActivation>(dy_i, z, activation), xc, Vec<P>{}};
    return {dy_i, xc, z};
  }

  // x is y here, and the coefficient kMean is the inverse of kSlope.
  template <typename C>
  TFOPS_INLINE Gradient<P> FromResult(Vec<P> dy, Vec<P> y, const C& c, int64_t column) const {
    constexpr Activation kActivation = K::kActivation;
    const Vec<P> dz = ActivationGradientFromResult<kActivation>(dy, y, activation);
    const Vec<P> least = Splat(LeastInvertible<P>(RoundingOf(kDataTypeOf<T>)));
    const Vec<P> z = activations::Of<kActivation>::InverseOf(y, activation, least);
    return {dz, (z - c.Get(kOffset, column)) * c.Get(kMean, column), Vec<P>{}};
  }

  template <bool kPartial, typename C>
  TFOPS_INLINE Gradient<P> Read(const C& c, int64_t column, int64_t i, int64_t n) const {
    return ReadWith<kPartial>(HasBits() ? LoadSomeBits(bits, i, n) : 0, c, column, i, n);
  }

  template <int kVectors>
  TFOPS_INLINE void Finish(Gradient<P> (&g)[kVectors]) const {
    if constexpr (!K::kIsKnown) ActivateGradients<P>(activation, g);
  }

  static TFOPS_INLINE void Add(const Gradient<P>& g, Vec<P>* sum_dz, Vec<P>* sum_dz_xc) {
    *sum_dz += g.dz;
    *sum_dz_xc += g.dz * g.xc;
  }
};

// Calls body with what is known of a job's inputs; kAddition: whether dresidual is written wherever bits are read.
template <bool kAddition, typename Body>
TFOPS_INLINE void WithKnownGradient(const BackwardJob& job, bool cached, Body body) {
  const Activation activation = job.problem.activation;
  const bool bits = job.arrays.activation_bits;
  if (job.problem.in_place) {
    return WithActivation(activation, [&](auto constant) {
      constexpr Activation kActivation = decltype(constant)::value;
      if constexpr (kIsInvertible<kActivation>) body(InPlace<kActivation>());
    });
  }
  if (job.arrays.residual) return body(Unknown());
  WithCached(cached, [&](auto is_cached) {
    constexpr bool kCached = decltype(is_cached)::value;
    if (activation == Activation::kNone) return body(Known<Activation::kNone, false, false, kCached>());
    WithActivation(activation, [&](auto constant) {
      constexpr Activation kActivation = decltype(constant)::value;
      if constexpr (!kHasLoops<kActivation> || (!kCached && kActivation != Activation::kRelu)) {
        body(Unknown());
      } else if (!bits) {
        body(Known<kActivation, false, false, kCached>());
      } else if constexpr (kIsPiecewiseLinear<kActivation>) {
        body(Known<kActivation, kAddition, true, kCached>());
      }
    });
  });
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_GRADIENT_H_
