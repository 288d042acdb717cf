// Activations of vectors: what activation.h asks of these, and activations that no loop knows.

#ifndef TFOPS_BATCH_NORM_CPU_VECTOR_ACTIVATION_H_
#define TFOPS_BATCH_NORM_CPU_VECTOR_ACTIVATION_H_

#include <type_traits>

#include "csrc/batch_norm/activation.h"
#include "csrc/batch_norm/cpu/conversions.h"

namespace tfops {

// x86: one instruction each. Of NaN and a number, and of two zeros, max and min return the second.
//
// AArch64: a comparison and a selection, but for what is one instruction: the lesser of a number other than zero and of
// z, which stays what it is if it is NaN, and a result of arithmetic, whose NaNs are quiet. (The greater of two zeros
// would be the positive one, which x86's may not be.)
template <typename V>
struct VectorBound {
  static constexpr bool kIsFloat = std::is_same_v<V, cpu::TFOPS_CPU_LEVEL::FloatVec>;

  static TFOPS_INLINE V Below(V z, V low) {
#ifdef __x86_64__
    if constexpr (kIsFloat) return TFOPS_X86_VECTOR(max, ps)(low, z);
    if constexpr (!kIsFloat) return TFOPS_X86_VECTOR(max, pd)(low, z);
#endif
    return z < low ? low : z;
  }
  static TFOPS_INLINE V Above(V z, V high) {
#if defined(__x86_64__)
    if constexpr (kIsFloat) return TFOPS_X86_VECTOR(min, ps)(high, z);
    if constexpr (!kIsFloat) return TFOPS_X86_VECTOR(min, pd)(high, z);
#elif defined(__aarch64__)
    if constexpr (kIsFloat) return (V)vminq_f32((float32x4_t)z, (float32x4_t)high);
    if constexpr (!kIsFloat) return (V)vminq_f64((float64x2_t)z, (float64x2_t)high);
#endif
    return z > high ? high : z;
  }
};
template <>
struct Bound<cpu::TFOPS_CPU_LEVEL::FloatVec> : VectorBound<cpu::TFOPS_CPU_LEVEL::FloatVec> {};
template <>
struct Bound<cpu::TFOPS_CPU_LEVEL::Vec<double>> : VectorBound<cpu::TFOPS_CPU_LEVEL::Vec<double>> {};

// Cephes' expf: x = k ln 2 + r, |r| <= ln 2 / 2, and a polynomial for exp(r). Error < 2 ulp, or half of a subnormal
// number's; inf above 88.73.
struct ExponentialOfFloats {
  using V = cpu::TFOPS_CPU_LEVEL::FloatVec;
  using Int = cpu::TFOPS_CPU_LEVEL::IntVec<float>;

  TFOPS_INLINE explicit ExponentialOfFloats(V x) {
    constexpr float kRound = 0x1.8p23f;  // adding and subtracting it rounds to an integer
    const V low = V{} - 104.0f;
    const V high = V{} + 89.0f;
    const V clamped = Bound<V>::Below(Bound<V>::Above(x, high), low);
    const V k = (clamped * 1.44269504088896341f + kRound) - kRound;
    r = (clamped - k * 0.693359375f) - k * -2.12194440e-4f;
    p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    exponent = __builtin_convertvector(x == x ? k : V{}, Int);  // NaN comes through p
  }
  // exp(r) = p r^2 + r + 1
  V p;
  V r;
  Int exponent;

  static TFOPS_INLINE V PowerOfTwo(Int k) { return cpu::TFOPS_CPU_LEVEL::BitCast<V>((k + 127) << 23); }
};

template <>
struct Exponential<cpu::TFOPS_CPU_LEVEL::FloatVec> {
  using V = cpu::TFOPS_CPU_LEVEL::FloatVec;

  static TFOPS_INLINE V Of(V x) {
    const ExponentialOfFloats e(x);
    // 2^k as a product of two: k reaches 128 and -150.
    const auto half = e.exponent >> 1;
    return (e.p * (e.r * e.r) + e.r + 1.0f) * e.PowerOfTwo(half) * e.PowerOfTwo(e.exponent - half);
  }
};

template <>
struct ExponentialLessOne<cpu::TFOPS_CPU_LEVEL::FloatVec> {
  using V = cpu::TFOPS_CPU_LEVEL::FloatVec;

  static TFOPS_INLINE V Of(V x) {
    const ExponentialOfFloats e(Bound<V>::Below(x, V{} - 30.0f));  // -1 in float from about -17 on
    const V power = e.PowerOfTwo(e.exponent);
    return (e.p * (e.r * e.r) + e.r) * power + (power - 1.0f);
  }
};

// 1 + y = m 2^k with 1/2 <= m < 1 makes log(m) + k ln 2. Above -1/2, where 1 + y would be rounded, y is m - 1 itself.
template <>
struct LogarithmOfOneLess<cpu::TFOPS_CPU_LEVEL::FloatVec> {
  using V = cpu::TFOPS_CPU_LEVEL::FloatVec;
  using Int = cpu::TFOPS_CPU_LEVEL::IntVec<float>;

  static TFOPS_INLINE V Of(V y) {
    const V e = y + 1.0f;
    const Int k = (cpu::TFOPS_CPU_LEVEL::BitCast<Int>(e) >> 23) - 126;
    const V less_one = e * ExponentialOfFloats::PowerOfTwo(-k) - 1.0f;
    const auto near = y >= V{} - 0.5f;
    const V log = LogarithmOfOnePlus<V>::Of(near ? y : less_one);
    const V power = __builtin_convertvector(k, V) * 0.69314718055994531f;
    return near ? log : log + power;
  }
};

// Of doubles, lane by lane.
template <>
struct Exponential<cpu::TFOPS_CPU_LEVEL::Vec<double>> {
  using V = cpu::TFOPS_CPU_LEVEL::Vec<double>;

  static TFOPS_INLINE V Of(V x) {
    for (int i = 0; i < cpu::TFOPS_CPU_LEVEL::kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
    return x;
  }
};
template <>
struct ExponentialLessOne<cpu::TFOPS_CPU_LEVEL::Vec<double>> {
  using V = cpu::TFOPS_CPU_LEVEL::Vec<double>;

  static TFOPS_INLINE V Of(V x) {
    for (int i = 0; i < cpu::TFOPS_CPU_LEVEL::kLanes<double>; ++i) x[i] = __builtin_expm1(x[i]);
    return x;
  }
};
template <>
struct LogarithmOfOnePlus<cpu::TFOPS_CPU_LEVEL::Vec<double>> {
  using V = cpu::TFOPS_CPU_LEVEL::Vec<double>;

  static TFOPS_INLINE V Of(V x) {
    for (int i = 0; i < cpu::TFOPS_CPU_LEVEL::kLanes<double>; ++i) x[i] = __builtin_log1p(x[i]);
    return x;
  }
};
template <>
struct LogarithmOfOneLess<cpu::TFOPS_CPU_LEVEL::Vec<double>> {
  using V = cpu::TFOPS_CPU_LEVEL::Vec<double>;

  static TFOPS_INLINE V Of(V y) { return LogarithmOfOnePlus<V>::Of(y); }
};
template <>
struct NormalTail<cpu::TFOPS_CPU_LEVEL::Vec<double>> {
  using V = cpu::TFOPS_CPU_LEVEL::Vec<double>;

  static TFOPS_INLINE V Of(V a, V /*density*/) {
    a *= 0.70710678118654752;
    for (int i = 0; i < cpu::TFOPS_CPU_LEVEL::kLanes<double>; ++i) a[i] = __builtin_erfc(a[i]);
    return a * 0.5;
  }
};

namespace cpu::TFOPS_CPU_LEVEL {
namespace {

template <Activation kValue>
using ActivationConstant = std::integral_constant<Activation, kValue>;

// Calls body with the activation as a constant.
template <typename Body>
TFOPS_INLINE void WithActivation(Activation activation, Body body) {
  switch (activation) {
#define TFOPS_CASE(Name, text) \
  case Activation::k##Name:    \
    return body(ActivationConstant<Activation::k##Name>());
    TFOPS_ACTIVATIONS(TFOPS_CASE)
#undef TFOPS_CASE
  }
}

// Whether loops may know the activation: each has many. The others compute so long that to ask costs little.
template <Activation kActivation>
inline constexpr bool kHasLoops =
    kActivation == Activation::kNone || kActivation == Activation::kSilu || kIsPiecewiseLinear<kActivation>;

// Calls body with the activation as a constant if it is piecewise linear.
template <typename Body>
TFOPS_INLINE void WithPiecewiseLinear(Activation activation, Body body) {
  WithActivation(activation, [&](auto constant) {
    if constexpr (kIsPiecewiseLinear<decltype(constant)::value>) body(constant);
  });
}

// What dz = dy * act'(z) is computed from and for.
template <typename P>
struct Gradient {
  Vec<P> dz;  // dy at first, if no loop knows the activation
  Vec<P> xc;  // x - mean
  Vec<P> z;   // only if no loop knows the activation
};

// Activations that are not piecewise linear take a few vectors at a time, and are out of line: one copy serves all
// loops. This puts act(z) in the place of z.
template <typename P>
__attribute__((noinline)) void ActivateOutOfLine(ActivationIn<P> activation, Vec<P>* z, int count) {
  WithActivation(activation.kind, [&](auto constant) {
    for (int v = 0; v < count; ++v) z[v] = Activate<decltype(constant)::value>(z[v], activation);
  });
}

// And this puts dz in the place of dy.
template <typename P>
__attribute__((noinline)) void ActivateGradientsOutOfLine(ActivationIn<P> activation, Gradient<P>* g, int count) {
  WithActivation(activation.kind, [&](auto constant) {
    for (int v = 0; v < count; ++v)
      g[v].dz = ActivationGradient<decltype(constant)::value>(g[v].dz, g[v].z, activation);
  });
}

// For loops that do not know the activation: puts act(z) in the place of z. If there are to be bits, which only
// piecewise linear activations have, returns where the slope is 1, the first vector's first; of 64 elements at most.
template <typename P, int kVectors>
TFOPS_INLINE uint64_t ActivateVectors(ActivationIn<P> activation, bool has_bits, Vec<P> (&z)[kVectors]) {
  uint64_t bits = 0;
  if (activation.kind == Activation::kNone) return bits;
  if (!IsPiecewiseLinear(activation.kind)) {
    Vec<P> copies[kVectors];  // so that z need not be in memory where it is not
    for (int v = 0; v < kVectors; ++v) copies[v] = z[v];
    ActivateOutOfLine<P>(activation, copies, kVectors);
    for (int v = 0; v < kVectors; ++v) z[v] = copies[v];
    return bits;
  }
  WithPiecewiseLinear(activation.kind, [&](auto constant) {
    constexpr Activation kActivation = decltype(constant)::value;
    for (int v = 0; v < kVectors && has_bits; ++v) {
      bits |= static_cast<uint64_t>(BitsFromMask<P>(IsOn<kActivation>(z[v]))) << v * kLanes<P>;
    }
    for (int v = 0; v < kVectors; ++v) z[v] = Activate<kActivation>(z[v], activation);
  });
  return bits;
}

// Likewise puts dz in the place of dy.
template <typename P, int kVectors>
TFOPS_INLINE void ActivateGradients(ActivationIn<P> activation, Gradient<P> (&g)[kVectors]) {
  if (activation.kind == Activation::kNone) return;
  if (!IsPiecewiseLinear(activation.kind)) {
    Gradient<P> copies[kVectors];
    for (int v = 0; v < kVectors; ++v) copies[v] = g[v];
    ActivateGradientsOutOfLine<P>(activation, copies, kVectors);
    for (int v = 0; v < kVectors; ++v) g[v].dz = copies[v].dz;
    return;
  }
  WithPiecewiseLinear(activation.kind, [&](auto constant) {
    for (int v = 0; v < kVectors; ++v)
      g[v].dz = ActivationGradient<decltype(constant)::value>(g[v].dz, g[v].z, activation);
  });
}

}  // namespace
}  // namespace cpu::TFOPS_CPU_LEVEL

}  // namespace tfops

#endif  // TFOPS_BATCH_NORM_CPU_VECTOR_ACTIVATION_H_
