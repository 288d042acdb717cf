// Activations and their derivatives, shared by host and device.
//
// TFOPS_ACTIVATIONS in batch_norm.h lists them; each is a struct of that name here, of one of two kinds:
//
//   piecewise linear: Of(z), IsOn(z), whether the slope is 1 at z; where it is not, it is the parameter `slope`, or 0;
//   smooth:           Of(z), and SlopeOf(z), its derivative.
//
// Those that have an inverse also have InverseOf(y, least), its z, of which y has the sign; and if they are smooth,
// SlopeFromResult(y), the derivative at that z. The parameters of those that have any are positive then.
//
// Those that have parameters (kHasParameters) take these too, as an ActivationIn of the arithmetic's type.
//
// F is float or double, or a GCC vector of them: `a < b ? c : d` then selects lane by lane. Comparisons are written so
// that NaN comes out as NaN.

#ifndef TFOPS_BATCH_NORM_ACTIVATION_H_
#define TFOPS_BATCH_NORM_ACTIVATION_H_

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/functions.h"
#include "csrc/batch_norm/portable.h"

namespace tfops {

// An activation with its parameters, in the type of the arithmetic.
template <typename F>
struct ActivationIn {
  Activation kind = Activation::kNone;
  F slope = 0;      // of what is made of straight pieces, below the threshold; elu's alpha
  F threshold = 0;  // where these bend
  F high = NAN;     // what they do not exceed; NaN, which nothing is above, if there is no such bound
  F inverse = 1;    // 1 / slope, for inverses

  ActivationIn() = default;
  explicit ActivationIn(const Problem& problem) : kind(problem.activation) {
    if (kind == Activation::kNone) slope = 1;
    if (kind == Activation::kRelu6) high = 6;
    if (kind == Activation::kLeakyRelu) slope = static_cast<float>(problem.negative_slope);
    if (kind == Activation::kElu) slope = static_cast<F>(problem.alpha);
    if (slope > 0) inverse = static_cast<F>(1 / static_cast<double>(slope));
    if (kind == Activation::kBoundedRelu) {
      slope = static_cast<F>(problem.negative_slope);
      threshold = static_cast<F>(problem.threshold);
      high = static_cast<F>(problem.max_value);
    }
  }

  // What is piecewise linear, for loops that serve all of that.
  TFOPS_INLINE F OfPieces(F z) const {
    const F bent = z < F(0) ? (slope == F(0) ? F(0) : z * slope) : z;  // an infinity times 0 would be NaN
    return bent > high ? high : bent;
  }
  TFOPS_INLINE bool IsOnPieces(F z) const { return z > F(0) && !(z >= high); }
};

namespace activations {

struct PiecewiseLinear {
  static constexpr bool kIsPiecewiseLinear = true;
  static constexpr bool kHasParameters = false;
  static constexpr bool kIsInvertible = false;
  template <typename F>
  static TFOPS_INLINE auto IsOn(F z) {
    return z > F{};
  }
};

struct Smooth {
  static constexpr bool kIsPiecewiseLinear = false;
  static constexpr bool kHasParameters = false;
  static constexpr bool kIsInvertible = false;
};

struct None : Smooth {
  static constexpr bool kIsInvertible = true;
  template <typename F>
  static TFOPS_INLINE F Of(F z) {
    return z;
  }
  template <typename F>
  static TFOPS_INLINE F SlopeOf(F) {
    return Number<F>(1);
  }
  template <typename F, typename Parameters>
  static TFOPS_INLINE F InverseOf(F y, const Parameters&, F) {
    return y;
  }
};

struct Relu : PiecewiseLinear {
  template <typename F>
  static TFOPS_INLINE F Of(F z) {
    return Bound<F>::Below(z, F{});
  }
};

struct Relu6 : PiecewiseLinear {
  template <typename F>
  static TFOPS_INLINE F Of(F z) {
    return Bound<F>::Above(Bound<F>::Below(z, F{}), F{} + 6);
  }
  template <typename F>
  static TFOPS_INLINE auto IsOn(F z) {
    return (z > F{}) & (z < F{} + 6);
  }
};

struct LeakyRelu : PiecewiseLinear {
  static constexpr bool kHasParameters = true;
  static constexpr bool kIsInvertible = true;
  template <typename F, typename Parameters>
  static TFOPS_INLINE F Of(F z, const Parameters& parameters) {
    return z < F{} ? z * parameters.slope : z;
  }
  template <typename F, typename Parameters>
  static TFOPS_INLINE F InverseOf(F y, const Parameters& parameters, F) {
    return y < F{} ? y * parameters.inverse : y;
  }
};

// As Keras' ReLU: z between the threshold and `high`, not more, and (z - threshold) * slope below. It has three slopes,
// for which a bit would not do, and so counts as smooth.
struct BoundedRelu : Smooth {
  static constexpr bool kHasParameters = true;
  template <typename F, typename Parameters>
  static TFOPS_INLINE F Of(F z, const Parameters& parameters) {
    const F threshold = F{} + parameters.threshold, high = F{} + parameters.high;
    const F bent = (z - threshold) * parameters.slope;
    const F below = parameters.slope == 0 ? F{} : bent;  // an infinity times 0 would be NaN
    return z <= threshold ? below : Bound<F>::Above(z, high);
  }
  template <typename F, typename Parameters>
  static TFOPS_INLINE F SlopeOf(F z, const Parameters& parameters) {
    const F high = F{} + parameters.high;
    const F above = z >= high ? F{} : z < high ? F{} + 1 : z;  // NaN
    return z <= F{} + parameters.threshold ? F{} + parameters.slope : above;
  }
};

// z * sigmoid(z).
struct Silu : Smooth {
  template <typename F>
  static TFOPS_INLINE F Of(F z) {
    return z * SigmoidOf(z);
  }
  template <typename F>
  static TFOPS_INLINE F SlopeOf(F z) {
    const F sigmoid = SigmoidOf(z);
    return sigmoid * (1 + z * (1 - sigmoid));
  }
};

// z * min(max(z + 3, 0), 6) / 6, as MobileNetV3 has it: 0 below -3, and z above 3.
struct HardSilu : Smooth {
  template <typename F>
  static TFOPS_INLINE F Of(F z) {
    return z * (Bound<F>::Above(Bound<F>::Below(z + 3, F{}), F{} + 6) * Number<F>(1.0 / 6));
  }
  template <typename F>
  static TFOPS_INLINE F SlopeOf(F z) {
    const F between = z * Number<F>(1.0 / 3) + Number<F>(0.5);
    return z <= Number<F>(-3) ? F{} : z >= F{} + 3 ? Number<F>(1) : between;
  }
};

// z * Phi(z), of the normal distribution's Phi.
struct Gelu : Smooth {
  template <typename F>
  static TFOPS_INLINE F Of(F z) {
    return z * Below(z, Density(z));
  }
  template <typename F>
  static TFOPS_INLINE F SlopeOf(F z) {
    const F density = Density(z);
    return Below(z, density) + z * (density * Number<F>(0.39894228040143268));
  }

 private:
  template <typename F>
  static TFOPS_INLINE F Density(F z) {
    return Exponential<F>::Of(z * z * Number<F>(-0.5));
  }
  template <typename F>
  static TFOPS_INLINE F Below(F z, F density) {
    const F tail = NormalTail<F>::Of(z < F{} ? -z : z, density);
    return z < F{} ? tail : 1 - tail;
  }
};

// z * (1 + tanh(u)) / 2 = z * sigmoid(2 u), with u = sqrt(2 / pi) * (z + 0.044715 z^3).
struct GeluTanh : Smooth {
  template <typename F>
  static TFOPS_INLINE F Of(F z) {
    return z * SigmoidOf(TwiceU(Bounded(z)));
  }
  template <typename F>
  static TFOPS_INLINE F SlopeOf(F z) {
    const F bounded = Bounded(z);
    const F twice_u = TwiceU(bounded);
    const F slope = Number<F>(kFactor) + bounded * bounded * Number<F>(3 * 0.044715 * kFactor);
    // sigmoid(v) (1 - sigmoid(v)) = e / (1 + e)^2 with e = exp(-|v|), without the cancellation.
    const F e = Exponential<F>::Of(twice_u < F{} ? twice_u : -twice_u);
    const F inverse = Reciprocal<F>::Of(1 + e);
    return (twice_u < F{} ? e * inverse : inverse) + bounded * slope * (e * (inverse * inverse));
  }

 private:
  static constexpr double kFactor = 1.5957691216057308;  // 2 sqrt(2 / pi)
  // Beyond, the sigmoid is 0 or 1 in any type, and powers of z could overflow.
  template <typename F>
  static TFOPS_INLINE F Bounded(F z) {
    return Bound<F>::Above(Bound<F>::Below(z, Number<F>(-40)), Number<F>(40));
  }
  template <typename F>
  static TFOPS_INLINE F TwiceU(F z) {
    return z * (Number<F>(kFactor) + z * z * Number<F>(0.044715 * kFactor));
  }
};

// z, or (exp(z) - 1) * alpha below 0.
struct Elu : Smooth {
  static constexpr bool kHasParameters = true;
  static constexpr bool kIsInvertible = true;
  template <typename F, typename Parameters>
  static TFOPS_INLINE F Of(F z, const Parameters& parameters) {
    return z > F{} ? z : ExponentialLessOne<F>::Of(Bound<F>::Above(z, F{})) * parameters.slope;
  }
  template <typename F, typename Parameters>
  static TFOPS_INLINE F SlopeOf(F z, const Parameters& parameters) {
    return z > F{} ? Number<F>(1) : Exponential<F>::Of(Bound<F>::Above(z, F{})) * parameters.slope;
  }
  // Results that have rounded to -alpha have no logarithm: y / alpha counts as `least` then, a number above -1.
  template <typename F, typename Parameters>
  static TFOPS_INLINE F InverseOf(F y, const Parameters& parameters, F least) {
    const F below = Bound<F>::Below(Bound<F>::Above(y, F{}) * parameters.inverse, least);
    return y > F{} ? y : LogarithmOfOneLess<F>::Of(below);
  }
  template <typename F, typename Parameters>
  static TFOPS_INLINE F SlopeFromResult(F y, const Parameters& parameters) {
    return y > F{} ? Number<F>(1) : y + parameters.slope;
  }
};

// 1.0507 times z, or times 1.6733 (exp(z) - 1) below 0.
struct Selu : Smooth {
  template <typename F>
  static TFOPS_INLINE F Of(F z) {
    const F below = ExponentialLessOne<F>::Of(Bound<F>::Above(z, F{})) * Number<F>(kScale * kAlpha);
    return z > F{} ? z * Number<F>(kScale) : below;
  }
  template <typename F>
  static TFOPS_INLINE F SlopeOf(F z) {
    const F below = Exponential<F>::Of(Bound<F>::Above(z, F{})) * Number<F>(kScale * kAlpha);
    return z > F{} ? Number<F>(kScale) : below;
  }

 private:
  static constexpr double kScale = 1.0507009873554804934193349852946;
  static constexpr double kAlpha = 1.6732632423543772848170429916717;
};

struct Tanh : Smooth {
  template <typename F>
  static TFOPS_INLINE F Of(F z) {
    const F less_one = ExponentialLessOne<F>::Of(MinusTwice(z));
    const F magnitude = -less_one / (less_one + 2);
    return z < F{} ? -magnitude : magnitude;
  }
  // 1 - tanh(z)^2 = 4 e / (1 + e)^2 with e = exp(-2 |z|), without the cancellation.
  template <typename F>
  static TFOPS_INLINE F SlopeOf(F z) {
    const F e = Exponential<F>::Of(MinusTwice(z));
    const F inverse = Reciprocal<F>::Of(1 + e);
    return 4 * e * (inverse * inverse);
  }

 private:
  template <typename F>
  static TFOPS_INLINE F MinusTwice(F z) {
    return z < F{} ? z + z : -z - z;
  }
};

struct Sigmoid : Smooth {
  template <typename F>
  static TFOPS_INLINE F Of(F z) {
    return SigmoidOf(z);
  }
  // e / (1 + e)^2 with e = exp(-|z|): both ends of the sigmoid have the same slope.
  template <typename F>
  static TFOPS_INLINE F SlopeOf(F z) {
    const F e = Exponential<F>::Of(z < F{} ? z : -z);
    const F inverse = Reciprocal<F>::Of(1 + e);
    return e * (inverse * inverse);
  }
};

// log(1 + exp(z)).
struct Softplus : Smooth {
  template <typename F>
  static TFOPS_INLINE F Of(F z) {
    const F e = Exponential<F>::Of(z < F{} ? z : -z);
    return Bound<F>::Below(z, F{}) + LogarithmOfOnePlus<F>::Of(e);
  }
  template <typename F>
  static TFOPS_INLINE F SlopeOf(F z) {
    return SigmoidOf(z);
  }
};

// z * tanh(softplus(z)) = z * n / (n + 2), with e = exp(z) and n = e (e + 2).
struct Mish : Smooth {
  template <typename F>
  static TFOPS_INLINE F Of(F z) {
    const F e = Exponential<F>::Of(Bounded(z));
    const F n = e * (e + 2);
    return z * (n / (n + 2));
  }
  template <typename F>
  static TFOPS_INLINE F SlopeOf(F z) {
    const F bounded = Bounded(z);
    const F e = Exponential<F>::Of(bounded);
    const F n = e * (e + 2);
    const F inverse = Reciprocal<F>::Of(n + 2);
    return n * inverse + bounded * (4 * e * (1 + e)) * (inverse * inverse);
  }

 private:
  // Beyond, n / (n + 2) is 1 in any type, and n could overflow.
  template <typename F>
  static TFOPS_INLINE F Bounded(F z) {
    return Bound<F>::Above(z, Number<F>(20));
  }
};

template <Activation kActivation>
struct Chosen;
#define TFOPS_CHOOSE(Name, text)       \
  template <>                          \
  struct Chosen<Activation::k##Name> { \
    using Type = activations::Name;    \
  };
TFOPS_ACTIVATIONS(TFOPS_CHOOSE)
#undef TFOPS_CHOOSE

template <Activation kActivation>
using Of = typename Chosen<kActivation>::Type;

}  // namespace activations

// Whether the activation is piecewise linear with two slopes, of which one is 1: a bit says all about its derivative.
template <Activation kActivation>
inline constexpr bool kIsPiecewiseLinear = activations::Of<kActivation>::kIsPiecewiseLinear;

TFOPS_INLINE constexpr bool IsPiecewiseLinear(Activation activation) {
  switch (activation) {
#define TFOPS_CASE(Name, text) \
  case Activation::k##Name:    \
    return kIsPiecewiseLinear<Activation::k##Name>;
    TFOPS_ACTIVATIONS(TFOPS_CASE)
#undef TFOPS_CASE
  }
  return false;
}

template <Activation kActivation, typename F, typename Parameters>
TFOPS_INLINE F Activate(F z, const Parameters& parameters) {
  using Chosen = activations::Of<kActivation>;
  if constexpr (Chosen::kHasParameters) {
    return Chosen::Of(z, parameters);
  } else {
    return Chosen::Of(z);
  }
}

// The derivative of a smooth activation.
template <Activation kActivation, typename F, typename Parameters>
TFOPS_INLINE F SlopeOf(F z, const Parameters& parameters) {
  using Chosen = activations::Of<kActivation>;
  if constexpr (Chosen::kHasParameters) {
    return Chosen::SlopeOf(z, parameters);
  } else {
    return Chosen::SlopeOf(z);
  }
}

// Whether the slope is 1 at z: a bool, or a vector of integers that are all ones or zero.
template <Activation kActivation, typename F>
TFOPS_INLINE auto IsOn(F z) {
  return activations::Of<kActivation>::IsOn(z);
}

// dy * act'(z) where IsOn(z) is known to be false.
template <Activation kActivation, typename F, typename Parameters>
TFOPS_INLINE F OffGradient(F dy, const Parameters& parameters) {
  if constexpr (kIsPiecewiseLinear<kActivation> && activations::Of<kActivation>::kHasParameters) {
    return dy * parameters.slope;
  }
  return F{};
}

// dz = dy * act'(z).
template <Activation kActivation, typename F, typename Parameters>
TFOPS_INLINE F ActivationGradient(F dy, F z, const Parameters& parameters) {
  if constexpr (kActivation == Activation::kNone) {
    return dy;
  } else if constexpr (kIsPiecewiseLinear<kActivation>) {
    return IsOn<kActivation>(z) ? dy : OffGradient<kActivation>(dy, parameters);
  } else {
    return dy * SlopeOf<kActivation>(z, parameters);
  }
}

}  // namespace tfops

#endif  // TFOPS_BATCH_NORM_ACTIVATION_H_
