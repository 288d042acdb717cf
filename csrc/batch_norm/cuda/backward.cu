// The backward entry points: which kernels run, in which order, with what.

#include "csrc/batch_norm/cuda/dispatch.h"
#include "csrc/batch_norm/cuda/finish.cuh"
#include "csrc/batch_norm/cuda/launch.h"
#include "csrc/batch_norm/cuda/runtime.h"
#include "csrc/batch_norm/cuda/streaming_backward.cuh"

namespace tfops::cuda {
namespace {

// The workspace: the coefficients [C], then the splits' sums.
size_t CoefficientBytes(const Problem& problem) {
  const size_t bytes = static_cast<size_t>(problem.channels) * sizeof(GradientCoefficients<double>);
  return (bytes + 63) / 64 * 64;
}

// Merges the splits' sums, of which there are none in an empty batch, and writes the gradients [C].
template <typename F>
Status FinishGradients(const Problem& problem, const BackwardArrays& arrays, const GradientSums* partials,
                       int64_t splits, GradientCoefficients<F>* coefficients, void* stream) {
  return Launch(FinishGradientKernel<F>, FinishGrid(problem.channels), kFinishBlock, stream, problem, arrays, partials,
                splits, coefficients);
}

template <typename T, int kLanes>
Status StreamingBackward(const Problem& problem, const BackwardArrays& arrays, void* workspace, int multiprocessors,
                         void* stream) {
  using F = Arithmetic<T>;
  const Tiling tiling = MakeTiling(problem, kLanes, multiprocessors);
  auto* coefficients = static_cast<GradientCoefficients<F>*>(workspace);
  auto* partials = reinterpret_cast<GradientSums*>(static_cast<char*>(workspace) + CoefficientBytes(problem));
  const AffineArrays affine{arrays.mean,   arrays.spread,     arrays.scale,
                            arrays.offset, !problem.training, problem.epsilon};
  const GradientArrays gradient{arrays.dy, arrays.x, NeedsResidual(problem) ? arrays.residual : nullptr,
                                NeedsMask(problem) ? arrays.mask : nullptr};
  // Without an activation dresidual is dy; where it is dy's array too, all is done.
  const bool done = problem.activation == Activation::kNone && arrays.dresidual == arrays.dy;
  void* const dresidual = done ? nullptr : arrays.dresidual;

  const Status moments = Launch(GradientMomentsKernel<T, kLanes>, tiling.grid, tiling.block, stream, tiling, affine,
                                gradient, problem.activation, partials);
  if (!moments.ok()) return moments;
  const Status finish = FinishGradients<F>(problem, arrays, partials, tiling.Splits(), coefficients, stream);
  if (!finish.ok()) return finish;
  return Launch(GradientNormalizeKernel<T, kLanes>, tiling.grid, tiling.block, stream, tiling, affine, gradient,
                problem.activation, coefficients, arrays.dx, dresidual);
}

}  // namespace

Status BackwardWorkspaceBytes(const Problem& problem, size_t* bytes) {
  int multiprocessors = 0;
  if (const Status status = Multiprocessors(&multiprocessors); !status.ok()) return status;
  *bytes = CoefficientBytes(problem) + SplitBytes(problem, sizeof(GradientSums), multiprocessors);
  return {};
}

Status Backward(const Problem& problem, const BackwardArrays& arrays, void* workspace, void* stream) {
  if (const Status status = Validate(problem); !status.ok()) return status;
  int multiprocessors = 0;
  if (const Status status = Multiprocessors(&multiprocessors); !status.ok()) return status;
  if (problem.channels == 0) return {};
  return WithDataType(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    using F = Arithmetic<T>;
    if (problem.Elements() == 0) return FinishGradients<F>(problem, arrays, nullptr, 0, nullptr, stream);
    const void* tensors[] = {arrays.dy, arrays.x, arrays.dx, arrays.dresidual,
                             NeedsResidual(problem) ? arrays.residual : nullptr};
    return WithLanes<T>(CanVectorize(problem, kVectorLanes<T>, tensors, 5), [&](auto lanes) {
      return StreamingBackward<T, decltype(lanes)::value>(problem, arrays, workspace, multiprocessors, stream);
    });
  });
}

}  // namespace tfops::cuda
