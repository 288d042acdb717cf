// x from y, for problems that keep y alone (Problem::in_place): the arithmetic of a channel, shared by host and device.
//
//   x - mean = (z - offset) / slope,  z = act^-1(y),  slope = scale * inv_std
//
// after Rota Bulo, Porzi and Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", 2018.
// y has been rounded to the data type. So (x - mean) * inv_std comes back with an error of about
//
//   unit * (|(x - mean) * inv_std| + |offset / scale|)
//
// with the unit of RoundingOf(), and of elu below 0 exp(-z) times that. Where the second term could come to a fourth,
// little is left of x, and the channel is refused.

#ifndef TFOPS_BATCH_NORM_IN_PLACE_H_
#define TFOPS_BATCH_NORM_IN_PLACE_H_

#include <cmath>

#include "csrc/batch_norm/activation.h"
#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/moments.h"
#include "csrc/batch_norm/portable.h"

namespace tfops {

// Whether z can be computed from act(z).
template <Activation kActivation>
inline constexpr bool kIsInvertible = activations::Of<kActivation>::kIsInvertible;

inline bool IsInvertible(Activation activation) {
  switch (activation) {
#define TFOPS_CASE(Name, text) \
  case Activation::k##Name:    \
    return kIsInvertible<Activation::k##Name>;
    TFOPS_ACTIVATIONS(TFOPS_CASE)
#undef TFOPS_CASE
  }
  return false;
}

// dz = dy * act'(z), where y = act(z) is known instead of z.
template <Activation kActivation, typename F, typename Parameters>
TFOPS_INLINE F ActivationGradientFromResult(F dy, F y, const Parameters& parameters) {
  if constexpr (kIsPiecewiseLinear<kActivation> || kActivation == Activation::kNone) {
    return ActivationGradient<kActivation>(dy, y, parameters);
  } else {
    return dy * activations::Of<kActivation>::SlopeFromResult(y, parameters);
  }
}

// How a data type rounds: numbers change by `unit` times themselves at most, or times the least normal number.
struct Rounding {
  double unit;
  double least_normal;
};

TFOPS_INLINE Rounding RoundingOf(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat16:
      return {0x1p-11, 0x1p-14};
    case DataType::kBFloat16:
      return {0x1p-8, 0x1p-126};
    case DataType::kFloat32:
      return {0x1p-24, 0x1p-126};
    case DataType::kFloat64:
      break;
  }
  return {0x1p-53, 0x1p-1022};
}

// Likewise of y: an activation that makes numbers smaller brings them nearer to the least normal one.
inline Rounding RoundingOf(const Problem& problem) {
  Rounding rounding = RoundingOf(problem.dtype);
  const double slope = problem.activation == Activation::kLeakyRelu ? problem.negative_slope
                       : problem.activation == Activation::kElu     ? problem.alpha
                                                                    : 1;
  if (slope > 0 && slope < 1) rounding.least_normal /= slope;
  return rounding;
}

// Whether x cannot be computed from y: scale is too near 0 beside offset. Not so if one of them is NaN, for all that
// comes of it is.
template <typename P>
TFOPS_INLINE bool IsScaleTooSmall(const Rounding& rounding, P scale, P offset) {
  const P least = static_cast<P>(4 * rounding.unit);
  const P largest = (offset < P(0) ? -offset : offset) + static_cast<P>(rounding.least_normal);
  return (scale < P(0) ? -scale : scale) <= least * largest;
}

// 1 / slope, or NaN where x cannot be computed: it makes the gradients of x and scale NaN, not wrong.
template <typename P>
TFOPS_INLINE P InverseSlope(const Rounding& rounding, P slope, P scale, P offset) {
  return IsScaleTooSmall(rounding, scale, offset) ? static_cast<P>(NAN) : 1 / slope;
}

// elu has rounded to -1 what is below that by half a unit; its z is taken for that of the number next to -1.
template <typename P>
TFOPS_INLINE P LeastInvertible(const Rounding& rounding) {
  return static_cast<P>(rounding.unit - 1);
}

}  // namespace tfops

#endif  // TFOPS_BATCH_NORM_IN_PLACE_H_
