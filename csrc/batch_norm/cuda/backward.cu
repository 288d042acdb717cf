// The backward entry points: which kernels run, in which order, with what.

#include <algorithm>
#include <memory>

#include "csrc/batch_norm/cuda/dispatch.h"
#include "csrc/batch_norm/cuda/finish.cuh"
#include "csrc/batch_norm/cuda/launch.h"
#include "csrc/batch_norm/cuda/onchip_launch.h"
#include "csrc/batch_norm/cuda/prepare.h"
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
                       const PartialsShape& shape, GradientCoefficients<F>* coefficients, void* stream) {
  return Launch(FinishGradientKernel<F>, FinishGrid(shape), FinishBlock(shape), stream, problem, arrays, partials,
                shape, coefficients);
}

template <typename T, int kLanes>
Status StreamingBackward(const Problem& problem, const BackwardArrays& arrays, const StreamingTiling& tiling,
                         void* workspace, void* stream) {
  using F = Arithmetic<T>;
  auto* coefficients = static_cast<GradientCoefficients<F>*>(workspace);
  auto* partials = reinterpret_cast<GradientSums*>(static_cast<char*>(workspace) + CoefficientBytes(problem));
  const AffineArrays affine = AffineOf(problem, arrays);
  const GradientArrays gradient = GradientOf(problem, arrays);
  const Status moments = Launch(GradientMomentsKernel<T, kLanes>, tiling.grid, tiling.block, stream, tiling, affine,
                                gradient, ActivationIn<F>(problem), partials);
  if (!moments.ok()) return moments;
  const Status finish = FinishGradients<F>(problem, arrays, partials, ShapeOf(tiling), coefficients, stream);
  if (!finish.ok()) return finish;
  return Launch(GradientNormalizeKernel<T, kLanes>, tiling.grid, tiling.block, stream, tiling, affine, gradient,
                ActivationIn<F>(problem), coefficients, problem.training, Mask{}, arrays.dx,
                ResidualGradient(problem, arrays));
}

bool GradientAligned(const Problem& problem, const BackwardArrays& arrays) {
  const void* tensors[] = {arrays.dy, arrays.x, arrays.dx, arrays.dresidual,
                           NeedsResidual(problem) ? arrays.residual : nullptr};
  return AllAligned(tensors, 5);
}

}  // namespace

Status BackwardWorkspaceBytes(const Problem& problem, size_t* bytes, Gpus gpus) {
  *bytes = 0;
  return ForEachDevice(gpus, [&](const Device& device) -> Status {
    if (problem.Elements() == 0) return {};
    std::shared_ptr<const Prepared> prepared;
    if (const Status status = Prepare(problem, Pass::kBackward, device, &prepared); !status.ok()) return status;
    const size_t sums = static_cast<size_t>(prepared->items) * sizeof(GradientSums);
    *bytes = std::max(*bytes, CoefficientBytes(problem) + sums);
    return {};
  });
}

Status Backward(const Problem& problem, const BackwardArrays& arrays, void* workspace, void* stream) {
  if (const Status status = Validate(problem); !status.ok()) return status;
  Device device;
  if (const Status status = CurrentDevice(&device); !status.ok()) return status;
  if (problem.channels == 0) return {};
  if (problem.Elements() == 0) {
    return WithDataType(problem.dtype, [&](auto type) {
      using F = Arithmetic<typename decltype(type)::Type>;
      return FinishGradients<F>(problem, arrays, nullptr, PartialsShape{0, 0, problem.channels}, nullptr, stream);
    });
  }
  const bool aligned = GradientAligned(problem, arrays);
  std::shared_ptr<const Prepared> prepared;
  if (const Status status = Prepare(problem, Pass::kBackward, device, &prepared); !status.ok()) return status;
  if (const Status& status = prepared->status[aligned]; !status.ok()) return status;
  const Choice& choice = prepared->choice[aligned];
  if (choice.tier != Tier::kStreaming) {
    const cudaError_t launched = OnChipBackward(choice.plan, problem, arrays, workspace, stream);
    const auto settled = Settle(launched, problem, Pass::kBackward, aligned, device, choice, stream);
    if (settled) return *settled;
  }
  const StreamingTiling& tiling = prepared->tiling[aligned];
  CountCall(Tier::kStreaming);
  return WithDataType(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return WithLanes<T>(tiling.lanes > 1, [&](auto lanes) {
      return StreamingBackward<T, decltype(lanes)::value>(problem, arrays, tiling, workspace, stream);
    });
  });
}

Status GradientMoments(const Problem& problem, const BackwardArrays& arrays, void* workspace, void* stream) {
  if (const Status status = Validate(problem); !status.ok()) return status;
  Device device;
  if (const Status status = CurrentDevice(&device); !status.ok()) return status;
  if (problem.channels == 0) return {};
  auto* partials = static_cast<GradientSums*>(workspace);
  const auto finish = [&](auto type, const PartialsShape& shape) {
    using F = Arithmetic<typename decltype(type)::Type>;
    return FinishGradients<F>(problem, arrays, partials, shape, nullptr, stream);
  };
  if (problem.Elements() == 0) {
    return WithDataType(problem.dtype, [&](auto type) { return finish(type, PartialsShape{0, 0, problem.channels}); });
  }
  CountCall(Tier::kStreaming);
  const StreamingTiling tiling = MakeStreamingTiling(problem, GradientAligned(problem, arrays), device.multiprocessors);
  return WithDataType(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return WithLanes<T>(tiling.lanes > 1, [&](auto lanes) {
      const Status moments = Launch(GradientMomentsKernel<T, decltype(lanes)::value>, tiling.grid, tiling.block, stream,
                                    tiling, AffineOf(problem, arrays), GradientOf(problem, arrays),
                                    ActivationIn<Arithmetic<T>>(problem), partials);
      return moments.ok() ? finish(type, ShapeOf(tiling)) : moments;
    });
  });
}

Status GradientNormalize(const Problem& problem, const BackwardArrays& arrays, const StatisticsGradient& statistics,
                         void* workspace, void* stream) {
  if (const Status status = Validate(problem); !status.ok()) return status;
  Device device;
  if (const Status status = CurrentDevice(&device); !status.ok()) return status;
  if (problem.Elements() == 0) return {};
  CountCall(Tier::kStreaming);
  const StreamingTiling tiling =
      MakeStreamingTiling(problem, statistics.mask, GradientAligned(problem, arrays), device.multiprocessors);
  return WithDataType(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return WithLanes<T>(tiling.lanes > 1, [&](auto lanes) {
      using F = Arithmetic<T>;
      auto* coefficients = static_cast<GradientCoefficients<F>*>(workspace);
      const Status gather = Launch(GatherCoefficientsKernel<F>, GatherGrid(problem.channels),
                                   Extent{FinishTuning::kThreads}, stream, statistics, problem.channels, coefficients);
      if (!gather.ok()) return gather;
      return Launch(GradientNormalizeKernel<T, decltype(lanes)::value>, tiling.grid, tiling.block, stream, tiling,
                    AffineOf(problem, arrays), GradientOf(problem, arrays), ActivationIn<F>(problem), coefficients,
                    /*centered=*/true, statistics.mask, arrays.dx, ResidualGradient(problem, arrays));
    });
  });
}

}  // namespace tfops::cuda
