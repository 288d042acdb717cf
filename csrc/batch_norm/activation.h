// Activations and their derivatives, shared by host and device.
//
// F is float or double, or a GCC vector of them: `a < b ? c : d` then selects lane by lane.

#ifndef TFOPS_BATCH_NORM_ACTIVATION_H_
#define TFOPS_BATCH_NORM_ACTIVATION_H_

#include <cmath>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/portable.h"

namespace tfops {

inline constexpr float kLeakyReluSlope = 0.2f;  // the default of tf.nn.leaky_relu and keras.activations.leaky_relu

template <typename F>
struct Exponential {
  static TFOPS_INLINE F Of(F z) { return exp(z); }
};
template <>
struct Exponential<float> {
  static TFOPS_INLINE float Of(float z) { return expf(z); }
};

// z, or the bound that it is beyond. NaN comes out as NaN.
template <typename F>
struct Bound {
  static TFOPS_INLINE F Below(F z, F low) { return z < low ? low : z; }
  static TFOPS_INLINE F Above(F z, F high) { return z > high ? high : z; }
};

// 1 / x, of floats on a GPU to 1 ulp: without the branch, and the call, that division has there for small results.
template <typename F>
struct Reciprocal {
  static TFOPS_INLINE F Of(F x) { return 1 / x; }
};
#ifdef __CUDA_ARCH__
template <>
struct Reciprocal<float> {
  static TFOPS_INLINE float Of(float x) {
    float reciprocal;
    asm("rcp.approx.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
    return reciprocal;
  }
};
#endif

template <typename F>
TFOPS_INLINE F Sigmoid(F z) {
  return Reciprocal<F>::Of(1 + Exponential<F>::Of(-z));
}

// Comparisons are written so that NaN comes out as NaN.
template <Activation kActivation, typename F>
TFOPS_INLINE F Activate(F z) {
  const F zero = F{};
  if constexpr (kActivation == Activation::kRelu) return Bound<F>::Below(z, zero);
  if constexpr (kActivation == Activation::kRelu6) return Bound<F>::Above(Bound<F>::Below(z, zero), zero + 6);
  if constexpr (kActivation == Activation::kLeakyRelu) return z < zero ? z * kLeakyReluSlope : z;
  if constexpr (kActivation == Activation::kSilu) return z * Sigmoid(z);
  return z;
}

// Whether the activation is piecewise linear with slopes 1 and OffSlope: one bit says all about its derivative.
constexpr bool IsPiecewiseLinear(Activation activation) {
  return activation == Activation::kRelu || activation == Activation::kRelu6 || activation == Activation::kLeakyRelu;
}

template <Activation kActivation>
inline constexpr bool kIsPiecewiseLinear = IsPiecewiseLinear(kActivation);

// Whether the slope is 1 at z: a bool, or a vector of integers that are all ones or zero.
template <Activation kActivation, typename F>
TFOPS_INLINE auto IsOn(F z) {
  static_assert(kIsPiecewiseLinear<kActivation>);
  const F zero = F{};
  if constexpr (kActivation == Activation::kRelu6) {
    return (z > zero) & (z < zero + 6);
  } else {
    return z > zero;
  }
}

// dy * act'(z) where IsOn(z) is known to be false.
template <Activation kActivation, typename F>
TFOPS_INLINE F OffGradient(F dy) {
  if constexpr (kActivation == Activation::kLeakyRelu) return dy * kLeakyReluSlope;
  return F{};
}

// dz = dy * act'(z).
template <Activation kActivation, typename F>
TFOPS_INLINE F ActivationGradient(F dy, F z) {
  if constexpr (kIsPiecewiseLinear<kActivation>) return IsOn<kActivation>(z) ? dy : OffGradient<kActivation>(dy);
  if constexpr (kActivation == Activation::kSilu) {
    const F sigmoid = Sigmoid(z);
    return dy * (sigmoid * (1 + z * (1 - sigmoid)));
  }
  return dy;
}

// The activations other than SiLU as numbers, for loops that serve them all: z * slope below 0, and not above `high`.
template <typename F>
struct Pieces {
  F slope;
  F high;  // NaN, which nothing is above, if there is no such bound

  static TFOPS_INLINE Pieces Of(Activation activation) {
    return {activation == Activation::kNone        ? F(1)
            : activation == Activation::kLeakyRelu ? F(kLeakyReluSlope)
                                                   : F(0),
            activation == Activation::kRelu6 ? F(6) : F(NAN)};
  }

  TFOPS_INLINE F Activate(F z) const {
    const F bent = z < F(0) ? (slope == F(0) ? F(0) : z * slope) : z;  // an infinity times 0 would be NaN
    return bent > high ? high : bent;
  }
  TFOPS_INLINE bool IsOn(F z) const { return z > F(0) && !(z >= high); }
};

}  // namespace tfops

#endif  // TFOPS_BATCH_NORM_ACTIVATION_H_
