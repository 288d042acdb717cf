// What the passes over elements share: coefficients by vector, and the constant activation.

#ifndef TFOPS_BATCH_NORM_CPU_ELEMENTS_H_
#define TFOPS_BATCH_NORM_CPU_ELEMENTS_H_

#include "csrc/batch_norm/cpu/kernels.h"
#include "csrc/batch_norm/cpu/simd.h"

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

// Coefficients by vector of elements, i being the first's place in its run: every lane a column of its own, ...
template <typename P>
struct ColumnCoefficients {
  const P* mean;
  const P* slope;
  const P* offset;
  const P* tilt;
  const P* shift;

  ColumnCoefficients(const Coefficients& c, int64_t column)
      : mean(static_cast<const P*>(c.mean) + column),
        slope(static_cast<const P*>(c.slope) + column),
        offset(static_cast<const P*>(c.offset) + column),
        tilt(static_cast<const P*>(c.tilt) + column),
        shift(static_cast<const P*>(c.shift) + column) {}

  TFOPS_INLINE Vec<P> Mean(int64_t i) const { return Load(mean + i); }
  TFOPS_INLINE Vec<P> Slope(int64_t i) const { return Load(slope + i); }
  TFOPS_INLINE Vec<P> Offset(int64_t i) const { return Load(offset + i); }
  TFOPS_INLINE Vec<P> Tilt(int64_t i) const { return Load(tilt + i); }
  TFOPS_INLINE Vec<P> Shift(int64_t i) const { return Load(shift + i); }
};

// ... or all lanes one channel.
template <typename P>
struct ChannelCoefficients {
  Vec<P> mean;
  Vec<P> slope;
  Vec<P> offset;
  Vec<P> tilt{};
  Vec<P> shift{};

  ChannelCoefficients(const Coefficients& c, int64_t channel)
      : mean(Splat(static_cast<const P*>(c.mean)[channel])),
        slope(Splat(static_cast<const P*>(c.slope)[channel])),
        offset(Splat(static_cast<const P*>(c.offset)[channel])) {
    if (c.tilt) tilt = Splat(static_cast<const P*>(c.tilt)[channel]);
    if (c.shift) shift = Splat(static_cast<const P*>(c.shift)[channel]);
  }
  // Those of z of one vector of columns, loaded.
  ChannelCoefficients(const ColumnCoefficients<P>& columns, int64_t i)
      : mean(columns.Mean(i)), slope(columns.Slope(i)), offset(columns.Offset(i)) {}

  TFOPS_INLINE Vec<P> Mean(int64_t) const { return mean; }
  TFOPS_INLINE Vec<P> Slope(int64_t) const { return slope; }
  TFOPS_INLINE Vec<P> Offset(int64_t) const { return offset; }
  TFOPS_INLINE Vec<P> Tilt(int64_t) const { return tilt; }
  TFOPS_INLINE Vec<P> Shift(int64_t) const { return shift; }
};

// z before residual and activation, as forward and backward both must compute it.
template <typename V>
TFOPS_INLINE V Affine(V xc, V slope, V offset) {
  return xc * slope + offset;
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_ELEMENTS_H_
