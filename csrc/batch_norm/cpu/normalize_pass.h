// y = act((x - mean) * slope + offset + residual), and the mask: run by run.

#ifndef TFOPS_BATCH_NORM_CPU_NORMALIZE_PASS_H_
#define TFOPS_BATCH_NORM_CPU_NORMALIZE_PASS_H_

#include "csrc/batch_norm/cpu/elements.h"
#include "csrc/batch_norm/cpu/runs.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// The arrays of one run. residual and bits may be null.
template <typename T>
struct NormalizeArrays {
  const T* x;
  const T* residual;
  T* y;
  uint8_t* bits;
  bool stream;
};

// Lanes i to i + lanes of a run, or the first n of them if kPartial. Returns their bits.
template <bool kPartial, Activation kActivation, typename T, typename C>
TFOPS_INLINE uint32_t NormalizeVector(const NormalizeArrays<T>& arrays, const C& coefficients, int64_t i, int64_t n) {
  using P = Param<T>;
  const Vec<P> x = LoadLanes<kPartial>(arrays.x + i, n);
  Vec<P> z = Affine<Vec<P>>(x - coefficients.Mean(i), coefficients.Slope(i), coefficients.Offset(i));
  if (arrays.residual) z += LoadLanes<kPartial>(arrays.residual + i, n);
  StoreLanes<kPartial>(arrays.y + i, Activate<kActivation>(z), n, arrays.stream);
  if constexpr (kIsPiecewiseLinear<kActivation>) {
    if (arrays.bits) return BitsFromMask<P>(IsOn<kActivation>(z));
  }
  return 0;
}

template <Activation kActivation, typename T, typename C>
TFOPS_INLINE void NormalizeRun(NormalizeArrays<T> arrays, const C& coefficients, int64_t length) {
  constexpr int kL = kLanes<Param<T>>;
  int64_t i = 0;
  if (arrays.stream && !arrays.bits) {
    i = ElementsBeforeStream(arrays.y, length);
    if (i > 0) NormalizeVector<true, kActivation>(arrays, coefficients, 0, i);
  }
  arrays.stream = arrays.stream && IsStreamable(arrays.y + i);
  for (; i + kBlock <= length; i += kBlock) {
    uint32_t bits = 0;
    for (int j = 0; j < kBlock; j += kL) {
      bits |= NormalizeVector<false, kActivation>(arrays, coefficients, i + j, kL) << j;
    }
    if (arrays.bits) std::memcpy(arrays.bits + i / 8, &bits, kBlock / 8);
  }
  if (i == length) return;
  uint32_t bits = 0;
  for (int64_t j = i; j < length; j += kL) {
    bits |= NormalizeVector<true, kActivation>(arrays, coefficients, j, Min(kL, length - j)) << (j - i);
  }
  bits &= (1u << (length - i)) - 1;
  if (arrays.bits) std::memcpy(arrays.bits + i / 8, &bits, static_cast<size_t>(length - i + 7) / 8);
}

template <typename T>
void NormalizeItem(const ForwardJob& job, int64_t item) {
  using P = Param<T>;
  const Problem& problem = job.problem;
  const Plan& plan = job.plan;
  const T* x = static_cast<const T*>(job.arrays.x);
  const T* residual = static_cast<const T*>(job.arrays.residual);
  T* y = static_cast<T*>(job.arrays.y);
  uint8_t* mask = job.arrays.mask;
  const bool buffered = mask && IsMaskBuffered(problem, plan);
  WithActivation(problem.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    ForEachRun(problem, plan, item, [&](const Run& run) {
      uint8_t buffer[kRunMaskBytes];
      uint8_t* bits = buffered ? buffer : MaskInPlace(problem, plan, run, mask);
      const NormalizeArrays<T> arrays{x + run.offset, residual ? residual + run.offset : nullptr, y + run.offset, bits,
                                      job.stream_y};
      if (plan.channels_last) {
        NormalizeRun<kActivation>(arrays, ColumnCoefficients<P>(job.coefficients, run.column), run.length);
      } else {
        NormalizeRun<kActivation>(arrays, ChannelCoefficients<P>(job.coefficients, run.column), run.length);
      }
      if (buffered) ScatterMask(problem, plan, run, buffer, mask);
    });
  });
  if (job.stream_y) StreamFence();
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_NORMALIZE_PASS_H_
