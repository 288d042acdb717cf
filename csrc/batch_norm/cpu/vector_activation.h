// What activation.h asks of vectors.

#ifndef TFOPS_BATCH_NORM_CPU_VECTOR_ACTIVATION_H_
#define TFOPS_BATCH_NORM_CPU_VECTOR_ACTIVATION_H_

#include "csrc/batch_norm/activation.h"
#include "csrc/batch_norm/cpu/simd.h"

namespace tfops {

#ifdef __x86_64__

// One instruction: of NaN and a number, and of two zeros, max and min return the second.
template <>
struct Bound<cpu::TFOPS_CPU_LEVEL::FloatVec> {
  using V = cpu::TFOPS_CPU_LEVEL::FloatVec;

  static TFOPS_INLINE V Below(V z, V low) { return TFOPS_X86_VECTOR(max, ps)(low, z); }
  static TFOPS_INLINE V Above(V z, V high) { return TFOPS_X86_VECTOR(min, ps)(high, z); }
};

template <>
struct Bound<cpu::TFOPS_CPU_LEVEL::Vec<double>> {
  using V = cpu::TFOPS_CPU_LEVEL::Vec<double>;

  static TFOPS_INLINE V Below(V z, V low) { return TFOPS_X86_VECTOR(max, pd)(low, z); }
  static TFOPS_INLINE V Above(V z, V high) { return TFOPS_X86_VECTOR(min, pd)(high, z); }
};

#elif defined(__aarch64__)

// A comparison and a selection, but for what is one instruction: the lesser of a number other than zero and of z, which
// stays what it is if it is NaN, and a result of arithmetic, whose NaNs are quiet. (The greater of two zeros would be
// the positive one, which x86's may not be.)
template <>
struct Bound<cpu::TFOPS_CPU_LEVEL::FloatVec> {
  using V = cpu::TFOPS_CPU_LEVEL::FloatVec;

  static TFOPS_INLINE V Below(V z, V low) { return z < low ? low : z; }
  static TFOPS_INLINE V Above(V z, V high) { return (V)vminq_f32((float32x4_t)z, (float32x4_t)high); }
};

template <>
struct Bound<cpu::TFOPS_CPU_LEVEL::Vec<double>> {
  using V = cpu::TFOPS_CPU_LEVEL::Vec<double>;

  static TFOPS_INLINE V Below(V z, V low) { return z < low ? low : z; }
  static TFOPS_INLINE V Above(V z, V high) { return (V)vminq_f64((float64x2_t)z, (float64x2_t)high); }
};

#endif

// Cephes' expf: x = k ln 2 + r, |r| <= ln 2 / 2, and a polynomial for exp(r). Error < 2 ulp; inf above 88.73, 0 (or a
// subnormal) below -87.33.
template <>
struct Exponential<cpu::TFOPS_CPU_LEVEL::FloatVec> {
  using V = cpu::TFOPS_CPU_LEVEL::FloatVec;

  static TFOPS_INLINE V Of(V x) {
    using cpu::TFOPS_CPU_LEVEL::BitCast;
    using Int = cpu::TFOPS_CPU_LEVEL::IntVec<float>;
    constexpr float kRound = 0x1.8p23f;  // adding and subtracting it rounds to an integer
    const V low = V{} - 88.0f;
    const V high = V{} + 89.0f;
    const V clamped = Bound<V>::Below(Bound<V>::Above(x, high), low);
    const V k = (clamped * 1.44269504088896341f + kRound) - kRound;
    const V r = (clamped - k * 0.693359375f) - k * -2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // 2^k as a product of two: k reaches 128 and -127. NaN comes through p.
    const Int exponent = __builtin_convertvector(x == x ? k : V{}, Int);
    const Int half = exponent >> 1;
    return p * BitCast<V>((half + 127) << 23) * BitCast<V>((exponent - half + 127) << 23);
  }
};

template <>
struct Exponential<cpu::TFOPS_CPU_LEVEL::Vec<double>> {
  using V = cpu::TFOPS_CPU_LEVEL::Vec<double>;

  static TFOPS_INLINE V Of(V x) {
    for (int i = 0; i < cpu::TFOPS_CPU_LEVEL::kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
    return x;
  }
};

}  // namespace tfops

#endif  // TFOPS_BATCH_NORM_CPU_VECTOR_ACTIVATION_H_
