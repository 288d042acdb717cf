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

namespace tfops::cuda {
namespace {

// Merges the splits' moments, of which there are none in an empty batch, and writes the vectors [C].
template <typename F>
Status FinishMoments(const Problem& problem, const ForwardArrays& arrays, const Moments<double>* partials,
                     const PartialsShape& shape, void* stream) {
  return Launch(FinishMomentsKernel<F>, FinishGrid(shape), FinishBlock(shape), stream, problem, arrays, partials,
                shape);
}

template <typename T, int kLanes>
Status StreamingForward(const Problem& problem, const ForwardArrays& arrays, const StreamingTiling& tiling,
                        void* workspace, void* stream) {
  AffineArrays affine{arrays.mean, nullptr, arrays.variance, arrays.scale, arrays.offset, problem.epsilon};
  if (problem.training) {
    auto* partials = static_cast<Moments<double>*>(workspace);
    const Status moments =
        Launch(MomentsKernel<T, kLanes>, tiling.grid, tiling.block, stream, tiling, arrays.x, Mask{}, partials);
    if (!moments.ok()) return moments;
    const Status finish = FinishMoments<Arithmetic<T>>(problem, arrays, partials, ShapeOf(tiling), stream);
    if (!finish.ok()) return finish;
    affine.mean = arrays.saved_mean;
    affine.inv_std = arrays.saved_inv_std;
  }
  const NormalizeArrays normalize{arrays.x, problem.has_residual ? arrays.residual : nullptr, arrays.y,
                                  NeedsActivationBits(problem) ? arrays.activation_bits : nullptr};
  return Launch(NormalizeKernel<T, kLanes>, tiling.grid, tiling.block, stream, tiling, affine, normalize,
                ActivationIn<Arithmetic<T>>(problem));
}

}  // namespace

Status ForwardWorkspaceBytes(const Problem& problem, size_t* bytes, Gpus gpus) {
  *bytes = 0;
  return ForEachDevice(gpus, [&](const Device& device) -> Status {
    if (!problem.training || problem.Elements() == 0) return {};
    std::shared_ptr<const Prepared> prepared;
    if (const Status status = Prepare(problem, Pass::kForward, device, &prepared); !status.ok()) return status;
    *bytes = std::max(*bytes, static_cast<size_t>(prepared->items) * sizeof(Moments<double>));
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
      return FinishMoments<F>(problem, arrays, nullptr, PartialsShape{0, 0, problem.channels}, stream);
    });
  }
  const void* tensors[] = {arrays.x, arrays.y, problem.has_residual ? arrays.residual : nullptr};
  const bool aligned = AllAligned(tensors, 3);
  std::shared_ptr<const Prepared> prepared;
  if (const Status status = Prepare(problem, Pass::kForward, device, &prepared); !status.ok()) return status;
  if (const Status& status = prepared->status[aligned]; !status.ok()) return status;
  const Choice& choice = prepared->choice[aligned];
  if (choice.tier != Tier::kStreaming) {
    const cudaError_t launched = OnChipForward(choice.plan, problem, arrays, workspace, stream);
    const auto settled = Settle(launched, problem, Pass::kForward, aligned, device, choice, stream);
    if (settled) return *settled;
  }
  const StreamingTiling& tiling = prepared->tiling[aligned];
  CountCall(Tier::kStreaming);
  return WithDataType(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return WithLanes<T>(tiling.lanes > 1, [&](auto lanes) {
      return StreamingForward<T, decltype(lanes)::value>(problem, arrays, tiling, workspace, stream);
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
