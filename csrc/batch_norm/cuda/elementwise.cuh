// What happens to each element: z = (x - mean) * (inv_std * scale) + offset + residual, the activation, its gradient,
// and the activation bits. Forward and backward share the code of z, and so agree on it to the last bit.

#ifndef TFOPS_BATCH_NORM_CUDA_ELEMENTWISE_CUH_
#define TFOPS_BATCH_NORM_CUDA_ELEMENTWISE_CUH_

#include "csrc/batch_norm/activation.h"
#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/tiling.h"
#include "csrc/batch_norm/cuda/types.cuh"
#include "csrc/batch_norm/in_place.h"

namespace tfops::cuda {

// What z takes from the channel, as arrays [C] of the param type. The variance is read where inv_std is null. Mean and
// inv_std are [V, C], a virtual batch's own.
struct AffineArrays {
  const void* mean = nullptr;
  const void* inv_std = nullptr;
  const void* variance = nullptr;
  const void* scale = nullptr;
  const void* offset = nullptr;
  double epsilon = 0;
  bool in_place = false;  // of a gradient: x is computed from y
  Rounding rounding{};    // of the data, iff in_place
};

// What z takes from the channel, in registers: for each lane's channel, or for the one that all lanes share. An inverse
// root of a given variance is taken in F, not in double as elsewhere: every thread takes one for each of its lanes, at
// the start of a kernel. A gradient that is in place has no use for the mean: there is 1 / slope in its place.
template <typename F, int kLanes>
struct Affine {
  F mean[kLanes];
  F slope[kLanes];
  F offset[kLanes];

  template <typename Walk>
  __device__ __forceinline__ Affine(const AffineArrays& arrays, const Tiling& tiling, const Walk& walk,
                                    int64_t virtual_batch) {
    const int64_t own = virtual_batch * tiling.channels;
    const F* const given = static_cast<const F*>(arrays.inv_std ? arrays.inv_std : arrays.variance) + own;
    const F* const means = static_cast<const F*>(arrays.mean) + own;
    F inv_std[kLanes];
    walk.ForLanes(tiling, [&](int lane, int64_t c) {
      inv_std[lane] = given[c];
      mean[lane] = means[c];
      slope[lane] = static_cast<const F*>(arrays.scale)[c];
      offset[lane] = static_cast<const F*>(arrays.offset)[c];
    });
    if (!arrays.inv_std) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        inv_std[lane] = InverseRoot(inv_std[lane] + static_cast<F>(arrays.epsilon));
      }
    }
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const F scale = slope[lane];
      slope[lane] *= inv_std[lane];
      if (arrays.in_place) mean[lane] = InverseSlope(arrays.rounding, slope[lane], scale, offset[lane]);
    }
  }
  __device__ __forceinline__ Affine() {}

  // z without the residual.
  __device__ __forceinline__ F Apply(F xc, int lane) const { return MultiplyAdd(xc, slope[lane], offset[lane]); }
};

// These ask for the activation once a vector, which all threads answer alike: ReLU, which is what most problems have,
// is not to take more instructions than it needs, and a kernel for each activation would cost every build.

// Puts of(a, z[lane]) in the place of z[lane] for the smooth activation `a`, a constant, lane by lane: each in turn is
// the first, for a switch among many functions is too much code to be unrolled.
template <typename F, int kLanes, typename Of>
__device__ __forceinline__ void ForSmooth(Activation activation, F (&z)[kLanes], const Of& of) {
#pragma unroll 1
  for (int turn = 0; turn < kLanes; ++turn) {
    F first = z[0];
    switch (activation) {
#define TFOPS_CASE(Name, text)                                                      \
  case Activation::k##Name:                                                         \
    if constexpr (!kIsPiecewiseLinear<Activation::k##Name>) {                       \
      first = of(std::integral_constant<Activation, Activation::k##Name>(), first); \
    }                                                                               \
    break;
      TFOPS_ACTIVATIONS(TFOPS_CASE)
#undef TFOPS_CASE
    }
#pragma unroll
    for (int lane = 0; lane + 1 < kLanes; ++lane) z[lane] = z[lane + 1];
    z[kLanes - 1] = first;
  }
}

// y = act(z), in place. Returns a bit for each lane whose slope is 1, if bits are wanted.
template <typename F, int kLanes>
__device__ __forceinline__ unsigned ActivateVector(const ActivationIn<F>& activation, bool wants_bits, F (&z)[kLanes]) {
  unsigned bits = 0;
  if (activation.kind == Activation::kNone) return bits;
  if (wants_bits) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) bits |= (activation.IsOnPieces(z[lane]) ? 1u : 0u) << lane;
  }
  if (activation.kind == Activation::kRelu) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) z[lane] = Activate<Activation::kRelu>(z[lane], activation);
  } else if (activation.kind == Activation::kSilu) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) z[lane] = Activate<Activation::kSilu>(z[lane], activation);
  } else if (IsPiecewiseLinear(activation.kind)) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) z[lane] = activation.OfPieces(z[lane]);
  } else {
    ForSmooth(activation.kind, z,
              [&](auto smooth, F each) { return Activate<decltype(smooth)::value>(each, activation); });
  }
  return bits;
}

// dz = dy * act'(z), in place, where `is_on` says of each lane whether the slope is 1.
template <typename F, int kLanes, typename IsOn>
__device__ __forceinline__ void GradientOfPieces(F slope, const IsOn& is_on, F (&gradient)[kLanes]) {
  if (slope == F(0)) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) gradient[lane] = is_on(lane) ? gradient[lane] : F(0);
  } else {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      gradient[lane] = is_on(lane) ? gradient[lane] : gradient[lane] * slope;
    }
  }
}

// Likewise, where z is known.
template <typename F, int kLanes>
__device__ __forceinline__ void ActivationGradientVector(const ActivationIn<F>& activation, const F (&z)[kLanes],
                                                         F (&gradient)[kLanes]) {
  if (activation.kind == Activation::kSilu) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      gradient[lane] = ActivationGradient<Activation::kSilu>(gradient[lane], z[lane], activation);
    }
    return;
  }
  if (!IsPiecewiseLinear(activation.kind)) {
    F slopes[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) slopes[lane] = z[lane];
    ForSmooth(activation.kind, slopes,
              [&](auto smooth, F each) { return SlopeOf<decltype(smooth)::value>(each, activation); });
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) gradient[lane] *= slopes[lane];
    return;
  }
  GradientOfPieces(activation.slope, [&](int lane) { return activation.IsOnPieces(z[lane]); }, gradient);
}

// Likewise, where act(z) is known instead of z, which takes its place. `least`: see InverseOf.
template <typename F, int kLanes>
__device__ __forceinline__ void GradientFromResultVector(const ActivationIn<F>& activation, F least, F (&y)[kLanes],
                                                         F (&gradient)[kLanes]) {
  if (activation.kind == Activation::kLeakyRelu) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      gradient[lane] = ActivationGradientFromResult<Activation::kLeakyRelu>(gradient[lane], y[lane], activation);
      y[lane] = activations::LeakyRelu::InverseOf(y[lane], activation, least);
    }
  } else if (activation.kind == Activation::kElu) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      gradient[lane] = ActivationGradientFromResult<Activation::kElu>(gradient[lane], y[lane], activation);
    }
    ForSmooth(activation.kind, y, [&](auto smooth, F each) {
      using Chosen = activations::Of<decltype(smooth)::value>;
      if constexpr (Chosen::kIsInvertible) return Chosen::InverseOf(each, activation, least);
      return each;
    });
  }
}

// Likewise, where the activation bits are known instead of z.
template <typename F, int kLanes>
__device__ __forceinline__ void ActivationGradientFromBits(const ActivationIn<F>& activation, unsigned bits,
                                                           F (&gradient)[kLanes]) {
  GradientOfPieces(activation.slope, [bits](int lane) { return (bits >> lane & 1) != 0; }, gradient);
}

// A byte of activation bits from those of 8 / kLanes neighbours in a warp. All threads of the warp take part; the
// result is the first neighbour's.
template <int kLanes>
__device__ __forceinline__ unsigned GatherByte(unsigned bits) {
#pragma unroll
  for (int have = kLanes; have < 8; have *= 2) bits |= __shfl_down_sync(0xffffffffu, bits, have / kLanes) << have;
  return bits & 0xffu;
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_ELEMENTWISE_CUH_
