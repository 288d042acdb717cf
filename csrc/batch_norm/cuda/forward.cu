// The forward entry points: which kernels run, in which order, with what.

#include "csrc/batch_norm/cuda/dispatch.h"
#include "csrc/batch_norm/cuda/finish.cuh"
#include "csrc/batch_norm/cuda/launch.h"
#include "csrc/batch_norm/cuda/runtime.h"
#include "csrc/batch_norm/cuda/streaming_forward.cuh"

namespace tfops::cuda {
namespace {

// Merges the splits' moments, of which there are none in an empty batch, and writes the vectors [C].
template <typename F>
Status FinishMoments(const Problem& problem, const ForwardArrays& arrays, const PartialMoments<double>* partials,
                     int64_t splits, void* stream) {
  return Launch(FinishMomentsKernel<F>, FinishGrid(problem.channels), kFinishBlock, stream, problem, arrays, partials,
                splits);
}

template <typename T, int kLanes>
Status StreamingForward(const Problem& problem, const ForwardArrays& arrays, void* workspace, int multiprocessors,
                        void* stream) {
  const Tiling tiling = MakeTiling(problem, kLanes, multiprocessors);
  AffineArrays affine{arrays.mean, arrays.variance, arrays.scale, arrays.offset, true, problem.epsilon};
  if (problem.training) {
    auto* partials = static_cast<PartialMoments<double>*>(workspace);
    const Status moments =
        Launch(MomentsKernel<T, kLanes>, tiling.grid, tiling.block, stream, tiling, arrays.x, partials);
    if (!moments.ok()) return moments;
    const Status finish = FinishMoments<Arithmetic<T>>(problem, arrays, partials, tiling.Splits(), stream);
    if (!finish.ok()) return finish;
    affine.mean = arrays.saved_mean;
    affine.spread = arrays.saved_inv_std;
    affine.spread_is_variance = false;
  }
  const NormalizeArrays normalize{arrays.x, problem.has_residual ? arrays.residual : nullptr, arrays.y,
                                  NeedsMask(problem) ? arrays.mask : nullptr};
  return Launch(NormalizeKernel<T, kLanes>, tiling.grid, tiling.block, stream, tiling, affine, normalize,
                problem.activation);
}

}  // namespace

Status ForwardWorkspaceBytes(const Problem& problem, size_t* bytes) {
  int multiprocessors = 0;
  if (const Status status = Multiprocessors(&multiprocessors); !status.ok()) return status;
  *bytes = problem.training ? SplitBytes(problem, sizeof(PartialMoments<double>), multiprocessors) : 0;
  return {};
}

Status Forward(const Problem& problem, const ForwardArrays& arrays, void* workspace, void* stream) {
  if (const Status status = Validate(problem); !status.ok()) return status;
  int multiprocessors = 0;
  if (const Status status = Multiprocessors(&multiprocessors); !status.ok()) return status;
  if (problem.channels == 0) return {};
  return WithDataType(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    if (problem.Elements() == 0) {
      return problem.training ? FinishMoments<Arithmetic<T>>(problem, arrays, nullptr, 0, stream) : Status();
    }
    const void* tensors[] = {arrays.x, arrays.y, problem.has_residual ? arrays.residual : nullptr};
    return WithLanes<T>(CanVectorize(problem, kVectorLanes<T>, tensors, 3), [&](auto lanes) {
      return StreamingForward<T, decltype(lanes)::value>(problem, arrays, workspace, multiprocessors, stream);
    });
  });
}

}  // namespace tfops::cuda
