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
#include "csrc/batch_norm/virtual_batches.h"

namespace tfops::cuda {
namespace {

// The workspace: virtual batches' shares in gradients, [V, C], then the coefficients [V, C], then the splits' sums.
size_t SharedBytes(const Problem& problem) { return CommonBytes(problem, sizeof(SharedGradients)); }
SharedGradients* SharedOf(const Problem& problem, void* workspace) {
  return problem.virtual_batches == 1 ? nullptr : static_cast<SharedGradients*>(workspace);
}

size_t CoefficientBytes(const Problem& problem) {
  const auto count = static_cast<size_t>(problem.virtual_batches * problem.channels);
  return (count * sizeof(GradientCoefficients<double>) + 63) / 64 * 64;
}

// Merges the splits' sums of so many virtual batches, of which there are none in an empty batch, and writes the
// gradients [C].
template <typename F>
Status FinishGradients(const Problem& problem, const BackwardArrays& arrays, const GradientSums* partials,
                       const PartialsShape& shape, int64_t count, GradientCoefficients<F>* coefficients,
                       SharedGradients* shared, void* stream) {
  return Launch(FinishGradientKernel<F>, OverVirtualBatches(FinishGrid(shape), count), FinishBlock(shape), stream,
                problem, arrays, partials, shape, coefficients, shared);
}

// Writes what virtual batches have in common, once they are all done.
template <typename F>
Status AddVirtualBatches(const Problem& problem, const BackwardArrays& arrays, const SharedGradients* shared,
                         void* stream) {
  if (problem.virtual_batches == 1) return {};
  return Launch(AddVirtualBatchesKernel<F>, MergeGrid(problem.channels), kMergeBlock, stream, problem, arrays, shared);
}

// So many virtual batches, each of which is `problem`, and which begin with that of the arrays.
template <typename T, int kLanes>
Status StreamingBackward(const Problem& problem, const BackwardArrays& arrays, const StreamingTiling& tiling,
                         int64_t count, SharedGradients* shared, GradientCoefficients<Arithmetic<T>>* coefficients,
                         GradientSums* partials, void* stream) {
  using F = Arithmetic<T>;
  const Extent grid = OverVirtualBatches(tiling.grid, count);
  const AffineArrays affine = AffineOf(problem, arrays);
  const GradientArrays gradient = GradientOf(problem, arrays);
  const Status moments = Launch(GradientMomentsKernel<T, kLanes>, grid, tiling.block, stream, tiling, affine, gradient,
                                ActivationIn<F>(problem), partials);
  if (!moments.ok()) return moments;
  const Status finish =
      FinishGradients<F>(problem, arrays, partials, ShapeOf(tiling), count, coefficients, shared, stream);
  if (!finish.ok()) return finish;
  return Launch(GradientNormalizeKernel<T, kLanes>, grid, tiling.block, stream, tiling, affine, gradient,
                ActivationIn<F>(problem), coefficients, problem.training, Mask{}, arrays.dx,
                ResidualGradient(problem, arrays));
}

// All virtual batches, and what they come to.
template <typename F, typename Body>
Status BackwardInParts(const Problem& problem, const BackwardArrays& arrays, void* workspace, void* stream,
                       const Body& body) {
  const Problem part = OfVirtualBatch(problem);
  SharedGradients* const shared = SharedOf(problem, workspace);
  const Status status = ForVirtualBatches(problem, [&](int64_t first, int64_t count) {
    return body(part, OfVirtualBatch(part, arrays, first), count, shared ? shared + first * problem.channels : nullptr);
  });
  return status.ok() ? AddVirtualBatches<F>(problem, arrays, shared, stream) : status;
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
    *bytes = std::max(*bytes, SharedBytes(problem));
    if (problem.Elements() == 0) return {};
    std::shared_ptr<const Prepared> prepared;
    if (const Status status = Prepare(problem, Pass::kBackward, device, &prepared); !status.ok()) return status;
    const size_t sums = static_cast<size_t>(prepared->items) * sizeof(GradientSums);
    *bytes = std::max(*bytes, SharedBytes(problem) + CoefficientBytes(problem) + sums);
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
      const auto finish = [&](const Problem& part, const BackwardArrays& its, int64_t count, SharedGradients* shared) {
        return FinishGradients<F>(part, its, nullptr, PartialsShape{0, 0, problem.channels}, count, nullptr, shared,
                                  stream);
      };
      return BackwardInParts<F>(problem, arrays, workspace, stream, finish);
    });
  }
  const bool aligned = GradientAligned(problem, arrays);
  std::shared_ptr<const Prepared> prepared;
  if (const Status status = Prepare(problem, Pass::kBackward, device, &prepared); !status.ok()) return status;
  if (const Status& status = prepared->status[aligned]; !status.ok()) return status;
  const Choice& choice = prepared->choice[aligned];
  if (choice.tier != Tier::kStreaming) {
    SharedGradients* const shared = SharedOf(problem, workspace);
    const cudaError_t launched = OnChipBackward(choice.plan, problem, arrays, workspace, shared, stream);
    const auto settled = Settle(launched, problem, Pass::kBackward, aligned, device, choice, stream);
    if (settled && !settled->ok()) return *settled;
    if (settled) {
      return WithDataType(problem.dtype, [&](auto type) {
        return AddVirtualBatches<Arithmetic<typename decltype(type)::Type>>(problem, arrays, shared, stream);
      });
    }
  }
  const StreamingTiling& tiling = prepared->tiling[aligned];
  CountCall(Tier::kStreaming);
  return WithDataType(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return WithLanes<T>(tiling.lanes > 1, [&](auto lanes) {
      using F = Arithmetic<T>;
      char* const behind = static_cast<char*>(workspace) + SharedBytes(problem);
      auto* coefficients = reinterpret_cast<GradientCoefficients<F>*>(behind);
      auto* partials = reinterpret_cast<GradientSums*>(behind + CoefficientBytes(problem));
      const auto stream_parts = [&](const Problem& part, const BackwardArrays& its, int64_t count,
                                    SharedGradients* shared) {
        return StreamingBackward<T, decltype(lanes)::value>(part, its, tiling, count, shared, coefficients, partials,
                                                            stream);
      };
      return BackwardInParts<F>(problem, arrays, workspace, stream, stream_parts);
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
    return FinishGradients<F>(problem, arrays, partials, shape, /*count=*/1, nullptr, nullptr, stream);
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
