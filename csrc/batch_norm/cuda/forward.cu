// The forward entry points: which kernels run, in which order, with what.

#include <algorithm>
#include <memory>

#include "csrc/batch_norm/cuda/dispatch.h"
#include "csrc/batch_norm/cuda/finish.cuh"
#include "csrc/batch_norm/cuda/launch.h"
#include "csrc/batch_norm/cuda/onchip_launch.h"
#include "csrc/batch_norm/cuda/prepare.h"
#include "csrc/batch_norm/cuda/runtime.h"
#include "csrc/batch_norm/cuda/streaming_forward.cuh"
#include "csrc/batch_norm/virtual_batches.h"

namespace tfops::cuda {
namespace {

// The workspace: what virtual batches have for the running statistics to take in, [V, C], then the splits' moments.
size_t TakenBytes(const Problem& problem) { return CommonBytes(problem, sizeof(TakenIn)); }
TakenIn* TakenOf(const Problem& problem, void* workspace) {
  return problem.virtual_batches == 1 ? nullptr : static_cast<TakenIn*>(workspace);
}

// Merges the splits' moments of so many virtual batches, of which there are none in an empty batch, and writes the
// vectors [C].
template <typename F>
Status FinishMoments(const Problem& problem, const ForwardArrays& arrays, const Moments<double>* partials,
                     const PartialsShape& shape, int64_t count, TakenIn* taken, void* stream) {
  return Launch(FinishMomentsKernel<F>, OverVirtualBatches(FinishGrid(shape), count), FinishBlock(shape), stream,
                problem, arrays, partials, shape, taken);
}

// Writes what virtual batches have in common, once they are all done.
template <typename F>
Status AverageVirtualBatches(const Problem& problem, const ForwardArrays& arrays, const TakenIn* taken, void* stream) {
  if (problem.virtual_batches == 1) return {};
  return Launch(AverageVirtualBatchesKernel<F>, MergeGrid(problem.channels), kMergeBlock, stream, problem, arrays,
                taken);
}

// So many virtual batches, each of which is `problem`, and which begin with that of the arrays.
template <typename T, int kLanes>
Status StreamingForward(const Problem& problem, const ForwardArrays& arrays, const StreamingTiling& tiling,
                        int64_t count, TakenIn* taken, Moments<double>* partials, void* stream) {
  const Extent grid = OverVirtualBatches(tiling.grid, count);
  AffineArrays affine{arrays.mean, nullptr, arrays.variance, arrays.scale, arrays.offset, problem.epsilon};
  if (problem.training) {
    const Status moments =
        Launch(MomentsKernel<T, kLanes>, grid, tiling.block, stream, tiling, arrays.x, Mask{}, partials);
    if (!moments.ok()) return moments;
    const Status finish =
        FinishMoments<Arithmetic<T>>(problem, arrays, partials, ShapeOf(tiling), count, taken, stream);
    if (!finish.ok()) return finish;
    affine.mean = arrays.saved_mean;
    affine.inv_std = arrays.saved_inv_std;
  }
  const NormalizeArrays normalize{arrays.x, problem.has_residual ? arrays.residual : nullptr, arrays.y,
                                  NeedsActivationBits(problem) ? arrays.activation_bits : nullptr};
  return Launch(NormalizeKernel<T, kLanes>, grid, tiling.block, stream, tiling, affine, normalize,
                ActivationIn<Arithmetic<T>>(problem));
}

// All virtual batches, and what they come to.
template <typename F, typename Body>
Status ForwardInParts(const Problem& problem, const ForwardArrays& arrays, void* workspace, void* stream,
                      const Body& body) {
  const Problem part = OfVirtualBatch(problem);
  TakenIn* const taken = TakenOf(problem, workspace);
  const Status status = ForVirtualBatches(problem, [&](int64_t first, int64_t count) {
    return body(part, OfVirtualBatch(part, arrays, first), count, taken ? taken + first * problem.channels : nullptr);
  });
  return status.ok() ? AverageVirtualBatches<F>(problem, arrays, taken, stream) : status;
}

}  // namespace

Status ForwardWorkspaceBytes(const Problem& problem, size_t* bytes, Gpus gpus) {
  *bytes = 0;
  return ForEachDevice(gpus, [&](const Device& device) -> Status {
    if (!problem.training) return {};
    *bytes = std::max(*bytes, TakenBytes(problem));
    if (problem.Elements() == 0) return {};
    std::shared_ptr<const Prepared> prepared;
    if (const Status status = Prepare(problem, Pass::kForward, device, &prepared); !status.ok()) return status;
    const size_t moments = static_cast<size_t>(prepared->items) * sizeof(Moments<double>);
    *bytes = std::max(*bytes, TakenBytes(problem) + moments);
    return {};
  });
}

Status Forward(const Problem& problem, const ForwardArrays& arrays, void* workspace, void* stream) {
  if (const Status status = Validate(problem); !status.ok()) return status;
  Device device;
  if (const Status status = CurrentDevice(&device); !status.ok()) return status;
  if (problem.channels == 0) return {};
  if (problem.Elements() == 0) {
    if (!problem.training) return {};
    return WithDataType(problem.dtype, [&](auto type) {
      using F = Arithmetic<typename decltype(type)::Type>;
      const auto finish = [&](const Problem& part, const ForwardArrays& its, int64_t count, TakenIn* taken) {
        return FinishMoments<F>(part, its, nullptr, PartialsShape{0, 0, problem.channels}, count, taken, stream);
      };
      return ForwardInParts<F>(problem, arrays, workspace, stream, finish);
    });
  }
  const void* tensors[] = {arrays.x, arrays.y, problem.has_residual ? arrays.residual : nullptr};
  const bool aligned = AllAligned(tensors, 3);
  std::shared_ptr<const Prepared> prepared;
  if (const Status status = Prepare(problem, Pass::kForward, device, &prepared); !status.ok()) return status;
  if (const Status& status = prepared->status[aligned]; !status.ok()) return status;
  const Choice& choice = prepared->choice[aligned];
  if (choice.tier != Tier::kStreaming) {
    TakenIn* const taken = TakenOf(problem, workspace);
    const cudaError_t launched = OnChipForward(choice.plan, problem, arrays, workspace, taken, stream);
    const auto settled = Settle(launched, problem, Pass::kForward, aligned, device, choice, stream);
    if (settled && !settled->ok()) return *settled;
    if (settled) {
      return WithDataType(problem.dtype, [&](auto type) {
        return AverageVirtualBatches<Arithmetic<typename decltype(type)::Type>>(problem, arrays, taken, stream);
      });
    }
  }
  const StreamingTiling& tiling = prepared->tiling[aligned];
  CountCall(Tier::kStreaming);
  return WithDataType(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return WithLanes<T>(tiling.lanes > 1, [&](auto lanes) {
      auto* partials = reinterpret_cast<Moments<double>*>(static_cast<char*>(workspace) + TakenBytes(problem));
      const auto stream_parts = [&](const Problem& part, const ForwardArrays& its, int64_t count, TakenIn* taken) {
        return StreamingForward<T, decltype(lanes)::value>(part, its, tiling, count, taken, partials, stream);
      };
      return ForwardInParts<Arithmetic<T>>(problem, arrays, workspace, stream, stream_parts);
    });
  });
}

Status MomentsWorkspaceBytes(const Problem& problem, size_t* bytes, Gpus gpus) {
  *bytes = 0;
  return ForEachDevice(gpus, [&](const Device& device) -> Status {
    if (problem.Elements() == 0) return {};
    for (const bool aligned : {false, true}) {
      const auto items = static_cast<size_t>(SplitItems(problem, aligned, device.multiprocessors));
      *bytes = std::max(*bytes, items * sizeof(Moments<double>));
    }
    return {};
  });
}

Status BatchMoments(const Problem& problem, const MomentsArrays& arrays, void* workspace, void* stream) {
  if (const Status status = ValidateMoments(problem); !status.ok()) return status;
  Device device;
  if (const Status status = CurrentDevice(&device); !status.ok()) return status;
  if (problem.channels == 0) return {};
  auto* partials = static_cast<Moments<double>*>(workspace);
  const auto finish = [&](auto type, const PartialsShape& shape) {
    using F = Arithmetic<typename decltype(type)::Type>;
    return Launch(FinishBatchMomentsKernel<F>, FinishGrid(shape), FinishBlock(shape), stream, arrays, partials, shape);
  };
  if (problem.Elements() == 0) {
    return WithDataType(problem.dtype, [&](auto type) { return finish(type, PartialsShape{0, 0, problem.channels}); });
  }
  CountCall(Tier::kStreaming);
  const StreamingTiling tiling =
      MakeStreamingTiling(problem, arrays.mask, AllAligned(&arrays.x, 1), device.multiprocessors);
  return WithDataType(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return WithLanes<T>(tiling.lanes > 1, [&](auto lanes) {
      const Status moments = Launch(MomentsKernel<T, decltype(lanes)::value>, tiling.grid, tiling.block, stream, tiling,
                                    arrays.x, arrays.mask, partials);
      return moments.ok() ? finish(type, ShapeOf(tiling)) : moments;
    });
  });
}

}  // namespace tfops::cuda
