// A vector of the backward pass: what it reads, dz and xc from that, and dx from those.

#ifndef TFOPS_BATCH_NORM_CUDA_GRADIENT_CUH_
#define TFOPS_BATCH_NORM_CUDA_GRADIENT_CUH_

#include "csrc/batch_norm/cuda/elementwise.cuh"
#include "csrc/batch_norm/cuda/sums.cuh"
#include "csrc/batch_norm/cuda/types.cuh"
#include "csrc/batch_norm/cuda/walk.cuh"

namespace tfops::cuda {

struct GradientArrays {
  const void* dy = nullptr;
  const void* x = nullptr;
  const void* residual = nullptr;            // or null
  const uint8_t* activation_bits = nullptr;  // or null
  bool in_place = false;                     // x is y
};

inline GradientArrays GradientOf(const Problem& problem, const BackwardArrays& arrays) {
  return {arrays.dy, arrays.x, NeedsResidual(problem) ? arrays.residual : nullptr,
          NeedsActivationBits(problem) ? arrays.activation_bits : nullptr, problem.in_place};
}

inline AffineArrays AffineOf(const Problem& problem, const BackwardArrays& arrays) {
  const void* const inv_std = problem.training ? arrays.inv_std : nullptr;
  return {arrays.mean,   inv_std,         arrays.variance,  arrays.scale,
          arrays.offset, problem.epsilon, problem.in_place, RoundingOf(problem)};
}

// Where dresidual has to be written. Null if it need not be: it is not wanted, or it is dy in dy's own array.
inline void* ResidualGradient(const Problem& problem, const BackwardArrays& arrays) {
  return problem.activation == Activation::kNone && arrays.dresidual == arrays.dy ? nullptr : arrays.dresidual;
}

// What one step of the backward phases reads, and what it makes of that.
template <typename T, int kLanes>
struct GradientStep {
  using F = Arithmetic<T>;

  Vector<T, kLanes> dy;
  Vector<T, kLanes> x;
  Vector<T, kLanes> residual;
  unsigned bits;
  bool inside;

  // kLast: it is the last time that these are read.
  template <bool kLast, typename Walk>
  __device__ __forceinline__ void LoadVectors(const GradientArrays& arrays, const Walk& walk) {
    inside = walk.Inside();
    if (!inside) return;
    LoadVector<kLast>(&dy, arrays.dy, walk.Offset());
    LoadVector<kLast>(&x, arrays.x, walk.Offset());
    if (arrays.residual) LoadVector<kLast>(&residual, arrays.residual, walk.Offset());
  }

  // Of a vector that is inside, if there are activation bits. kMayFold: their rows may not be the view's.
  template <bool kMayFold, typename Walk>
  __device__ __forceinline__ void LoadBits(const GradientArrays& arrays, const Tiling& tiling, const Walk& walk,
                                           int64_t virtual_batch) {
    if (!arrays.activation_bits) return;
    if (kMayFold && tiling.Folded()) {
      bits = walk.LoadFoldedBits(tiling, arrays.activation_bits, virtual_batch);
    } else {
      bits = LoadGlobal(arrays.activation_bits + walk.BitsOffset(tiling, virtual_batch)) >> walk.BitInByte();
    }
  }

  // All of that, in the streaming tier.
  template <bool kLast, typename Walk>
  __device__ __forceinline__ void Load(const GradientArrays& arrays, const Tiling& tiling, const Walk& walk,
                                       int64_t virtual_batch) {
    LoadVectors<kLast>(arrays, walk);
    if (inside) LoadBits<false>(arrays, tiling, walk, virtual_batch);
  }

  // dz = dy * act'(z) and xc = x - mean.
  __device__ __forceinline__ void Compute(const GradientArrays& arrays, const ActivationIn<F>& activation,
                                          const Affine<F, kLanes>& affine, F (&dz)[kLanes], F (&xc)[kLanes]) const {
    dy.Unpack(dz);
    x.Unpack(xc);
    if (arrays.in_place) {
      GradientFromResultVector(activation, LeastInvertible<F>(RoundingOf(kDataTypeOf<T>)), xc, dz);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) xc[lane] = (xc[lane] - affine.offset[lane]) * affine.mean[lane];
      return;
    }
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) xc[lane] -= affine.mean[lane];
    if (activation.kind == Activation::kNone) return;
    if (arrays.activation_bits) return ActivationGradientFromBits(activation, bits, dz);
    F z[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) z[lane] = affine.Apply(xc[lane], lane);
    if (arrays.residual) {
      F added[kLanes];
      residual.Unpack(added);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) z[lane] += added[lane];
    }
    ActivationGradientVector(activation, z, dz);
  }

 private:
  template <bool kLast>
  __device__ __forceinline__ static void LoadVector(Vector<T, kLanes>* vector, const void* array, int64_t offset) {
    if constexpr (kLast) {
      vector->LoadLast(array, offset);
    } else {
      vector->Load(array, offset);
    }
  }
};

// Adds the gradients of what a walk comes to, with kBatch vectors of each array in flight.
template <typename T, int kBatch, int kLanes>
__device__ __forceinline__ void AddGradients(const GradientArrays& arrays, const Tiling& tiling,
                                             const ActivationIn<Arithmetic<T>>& activation,
                                             const Affine<Arithmetic<T>, kLanes>& affine, int64_t virtual_batch,
                                             Walk<kLanes, Direction::kForward>* walk,
                                             GradientAccumulator<Arithmetic<T>, kLanes>* accumulator) {
  while (!walk->Done()) {
    GradientStep<T, kLanes> batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      batch[i].template Load<false>(arrays, tiling, *walk, virtual_batch);
      walk->Advance();
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!batch[i].inside) continue;
      Arithmetic<T> dz[kLanes], xc[kLanes];
      batch[i].Compute(arrays, activation, affine, dz, xc);
      accumulator->Add(dz, xc);
    }
    accumulator->CloseLongChain(kBatch);
  }
}

// dx from dz, in place. Where the statistics were given (not `centered`), xc has no part in it, and may be infinite.
template <typename F, int kLanes>
__device__ __forceinline__ void InputGradientVector(bool centered, const Affine<F, kLanes>& affine,
                                                    const F (&tilt)[kLanes], const F (&shift)[kLanes],
                                                    const F (&xc)[kLanes], F (&dz)[kLanes]) {
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    const F rest = centered ? MultiplyAdd(xc[lane], tilt[lane], shift[lane]) : F(0);
    dz[lane] = MultiplyAdd(dz[lane], affine.slope[lane], rest);
  }
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_GRADIENT_CUH_
