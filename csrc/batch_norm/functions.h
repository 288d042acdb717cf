// The functions that activations are made of. Those of vectors have specializations in cpu/vector_activation.h.

#ifndef TFOPS_BATCH_NORM_FUNCTIONS_H_
#define TFOPS_BATCH_NORM_FUNCTIONS_H_

#include <cmath>
#include <type_traits>
#include <utility>

#include "csrc/batch_norm/portable.h"

namespace tfops {

template <typename F>
struct Exponential {
  static TFOPS_INLINE F Of(F z) { return exp(z); }
};
template <>
struct Exponential<float> {
  static TFOPS_INLINE float Of(float z) { return expf(z); }
};

// exp(z) - 1, for z <= 0.
template <typename F>
struct ExponentialLessOne {
  static TFOPS_INLINE F Of(F z) { return expm1(z); }
};
template <>
struct ExponentialLessOne<float> {
  static TFOPS_INLINE float Of(float z) { return expm1f(z); }
};

// log(1 + y), for -1 < y <= 0.
template <typename F>
struct LogarithmOfOneLess {
  static TFOPS_INLINE F Of(F y) { return log1p(y); }
};
template <>
struct LogarithmOfOneLess<float> {
  static TFOPS_INLINE float Of(float y) { return log1pf(y); }
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

// log(1 + e), for 0 <= e <= 1: 2 atanh(s) with s = e / (2 + e), as a series, for s is a third at most. Error < 2 ulp of
// float.
template <typename F>
struct LogarithmOfOnePlus {
  static TFOPS_INLINE F Of(F e) {
    const F s = e / (e + 2.0f);
    const F w = s * s;
    F p = w * (1.0f / 13) + 1.0f / 11;
    p = p * w + 1.0f / 9;
    p = p * w + 1.0f / 7;
    p = p * w + 1.0f / 5;
    p = p * w + 1.0f / 3;
    return 2.0f * (p * w * s + s);
  }
};
template <>
struct LogarithmOfOnePlus<double> {
  static TFOPS_INLINE double Of(double e) { return log1p(e); }
};

// The normal distribution's probability of less than -a, for a >= 0, from density = exp(-a * a / 2): that times a
// polynomial in 1 / (1 + 0.4 a), fitted to the least relative error, of 2e-8, which rounding makes 2 ulp of float.
template <typename F>
struct NormalTail {
  static TFOPS_INLINE F Of(F a, F density) {
    const F t = Reciprocal<F>::Of(a * 0.4f + 1.0f);
    F p = t * 3.2295036044e-02f - 1.7723716488e-01f;
    p = p * t + 3.8325206794e-01f;
    p = p * t - 3.7520737675e-01f;
    p = p * t + 1.2037607461e-01f;
    p = p * t - 2.7261017316e-02f;
    p = p * t + 9.1459395540e-02f;
    p = p * t + 1.3311753266e-01f;
    p = p * t + 1.5962965449e-01f;
    p = p * t + 1.5957580527e-01f;
    return density * (p * t);
  }
};
template <>
struct NormalTail<double> {
  static TFOPS_INLINE double Of(double a, double /*density*/) { return erfc(a * 0.70710678118654752) * 0.5; }
};

// z, or the bound that it is beyond. NaN comes out as NaN.
template <typename F>
struct Bound {
  static TFOPS_INLINE F Below(F z, F low) { return z < low ? low : z; }
  static TFOPS_INLINE F Above(F z, F high) { return z > high ? high : z; }
};

template <typename F>
TFOPS_INLINE F SigmoidOf(F z) {
  return Reciprocal<F>::Of(1 + Exponential<F>::Of(-z));
}

// A number, in every lane if F is a vector.
template <typename F>
TFOPS_INLINE F Number(double value) {
  if constexpr (std::is_arithmetic_v<F>) {
    return static_cast<F>(value);
  } else {
    return F{} + static_cast<std::remove_reference_t<decltype(std::declval<F&>()[0])>>(value);
  }
}

}  // namespace tfops

#endif  // TFOPS_BATCH_NORM_FUNCTIONS_H_
