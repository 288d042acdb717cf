// What the passes over elements share: coefficients by vector, and the constant activation.

#ifndef TFOPS_BATCH_NORM_CPU_ELEMENTS_H_
#define TFOPS_BATCH_NORM_CPU_ELEMENTS_H_

#include <type_traits>

#include "csrc/batch_norm/cpu/kernels.h"
#include "csrc/batch_norm/cpu/stored.h"
#include "csrc/batch_norm/cpu/vector_activation.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// Calls body with the activation as a constant, so that inner loops know it.
template <Activation kValue>
struct ActivationConstant {
  static constexpr Activation value = kValue;
};
template <typename Body>
TFOPS_INLINE void WithActivation(Activation activation, Body body) {
  switch (activation) {
    case Activation::kNone:
      return body(ActivationConstant<Activation::kNone>());
    case Activation::kRelu:
      return body(ActivationConstant<Activation::kRelu>());
    case Activation::kRelu6:
      return body(ActivationConstant<Activation::kRelu6>());
    case Activation::kLeakyRelu:
      return body(ActivationConstant<Activation::kLeakyRelu>());
    case Activation::kSilu:
      return body(ActivationConstant<Activation::kSilu>());
  }
}

// For an array that may be absent.
template <typename T>
TFOPS_INLINE T* Advance(T* p, int64_t n) {
  return p ? p + n : nullptr;
}

// Which of the arrays that may be absent a job has, for its loops: to ask for each of a few at each vector takes as
// long as to compute it. If they are cached, nothing is streamed, or fetched ahead.
struct AnyArrays {
  static constexpr bool kAreKnown = false;
  static constexpr bool kAreCached = false;
  static constexpr bool kHasResidual = false;
  static constexpr bool kHasBits = false;
};
template <bool kCached, bool kResidual, bool kBits>
struct KnownArrays {
  static constexpr bool kAreKnown = true;
  static constexpr bool kAreCached = kCached;
  static constexpr bool kHasResidual = kResidual;
  static constexpr bool kHasBits = kBits;
};

// x86 without AVX2, and machines that the kernels do not know, have no loops of their own for what is cached: they ask.
#if TFOPS_VECTOR_BYTES >= 32 || defined(__aarch64__)
inline constexpr bool kHasCachedLoops = true;
#else
inline constexpr bool kHasCachedLoops = false;
#endif

// Calls body with whether a job's arrays are cached, as a constant. With tiles they are, or as good as that.
template <Traversal kTraversal, typename Body>
TFOPS_INLINE void WithCached(bool cached, Body body) {
  static_assert(kTraversal != Traversal::kStreamed, "these tiles are for memory");
  if constexpr (kTraversal != Traversal::kNone) {
    body(std::true_type());
  } else {
    if constexpr (kHasCachedLoops) {
      if (cached) return body(std::true_type());
    }
    body(std::false_type());
  }
}

// The coefficients of a vector of elements, wherever it lies: those of one channel in all lanes, or loaded.
template <typename P>
struct VectorCoefficients {
  static constexpr bool kAreLoaded = false;

  Vec<P> mean{};
  Vec<P> slope{};
  Vec<P> offset{};
  Vec<P> tilt{};
  Vec<P> shift{};

  TFOPS_INLINE Vec<P> Mean(int64_t) const { return mean; }
  TFOPS_INLINE Vec<P> Slope(int64_t) const { return slope; }
  TFOPS_INLINE Vec<P> Offset(int64_t) const { return offset; }
  TFOPS_INLINE Vec<P> Tilt(int64_t) const { return tilt; }
  TFOPS_INLINE Vec<P> Shift(int64_t) const { return shift; }
};

template <typename P>
TFOPS_INLINE VectorCoefficients<P> ChannelCoefficients(const Coefficients& c, int64_t channel) {
  const auto splat = [&](const void* piece) { return piece ? Splat(static_cast<const P*>(piece)[channel]) : Vec<P>{}; };
  return {splat(c.mean), splat(c.slope), splat(c.offset), splat(c.tilt), splat(c.shift)};
}

// Those of a run of columns, each lane a column of its own: i is the place of a vector's first element in the run.
template <typename P>
struct ColumnCoefficients {
  static constexpr bool kAreLoaded = true;

  const P* mean;
  const P* slope;
  const P* offset;
  const P* tilt;
  const P* shift;

  ColumnCoefficients(const Coefficients& c, int64_t column)
      : mean(Advance(static_cast<const P*>(c.mean), column)),
        slope(Advance(static_cast<const P*>(c.slope), column)),
        offset(Advance(static_cast<const P*>(c.offset), column)),
        tilt(Advance(static_cast<const P*>(c.tilt), column)),
        shift(Advance(static_cast<const P*>(c.shift), column)) {}

  // From column i of the run on.
  TFOPS_INLINE ColumnCoefficients From(int64_t i) const {
    ColumnCoefficients from = *this;
    for (const P** piece : {&from.mean, &from.slope, &from.offset, &from.tilt, &from.shift}) {
      *piece = Advance(*piece, i);
    }
    return from;
  }

  // One vector's. kAll: of dx too, not only of z.
  template <bool kAll>
  TFOPS_INLINE VectorCoefficients<P> Loaded(int64_t i) const {
    VectorCoefficients<P> loaded{Mean(i), Slope(i), Offset(i)};
    if constexpr (kAll) {
      loaded.tilt = Tilt(i);
      loaded.shift = Shift(i);
    }
    return loaded;
  }

  TFOPS_INLINE Vec<P> Mean(int64_t i) const { return Load(mean + i); }
  TFOPS_INLINE Vec<P> Slope(int64_t i) const { return Load(slope + i); }
  TFOPS_INLINE Vec<P> Offset(int64_t i) const { return Load(offset + i); }
  TFOPS_INLINE Vec<P> Tilt(int64_t i) const { return Load(tilt + i); }
  TFOPS_INLINE Vec<P> Shift(int64_t i) const { return Load(shift + i); }
};

// z before residual and activation, as forward and backward both must compute it.
template <typename V>
TFOPS_INLINE V Affine(V xc, V slope, V offset) {
  return xc * slope + offset;
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_ELEMENTS_H_
