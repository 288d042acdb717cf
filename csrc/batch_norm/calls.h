// The entry points of batch_norm.h as types. Each names its arrays, and has the size of its workspace and itself, for
// either device: code that serves several entry points is a template of these.

#ifndef TFOPS_BATCH_NORM_CALLS_H_
#define TFOPS_BATCH_NORM_CALLS_H_

#include "csrc/batch_norm/batch_norm.h"

namespace tfops {

struct ForwardCall {
  using Arrays = ForwardArrays;
  static constexpr auto kCpuWorkspaceBytes = cpu::ForwardWorkspaceBytes;
  static constexpr auto kCpu = cpu::Forward;
  static constexpr auto kCudaWorkspaceBytes = cuda::ForwardWorkspaceBytes;
  static constexpr auto kCuda = cuda::Forward;
};

struct BackwardCall {
  using Arrays = BackwardArrays;
  static constexpr auto kCpuWorkspaceBytes = cpu::BackwardWorkspaceBytes;
  static constexpr auto kCpu = cpu::Backward;
  static constexpr auto kCudaWorkspaceBytes = cuda::BackwardWorkspaceBytes;
  static constexpr auto kCuda = cuda::Backward;
};

struct MomentsCall {
  using Arrays = MomentsArrays;
  static constexpr auto kCpuWorkspaceBytes = cpu::MomentsWorkspaceBytes;
  static constexpr auto kCpu = cpu::BatchMoments;
  static constexpr auto kCudaWorkspaceBytes = cuda::MomentsWorkspaceBytes;
  static constexpr auto kCuda = cuda::BatchMoments;
};

struct GradientMomentsCall : BackwardCall {
  static constexpr auto kCpu = cpu::GradientMoments;
  static constexpr auto kCuda = cuda::GradientMoments;
};

struct GradientNormalizeArrays : BackwardArrays {
  StatisticsGradient statistics;
};

struct GradientNormalizeCall : BackwardCall {
  using Arrays = GradientNormalizeArrays;
  static Status kCpu(const Problem& problem, const Arrays& arrays, void* workspace, const cpu::Threads& threads) {
    return cpu::GradientNormalize(problem, arrays, arrays.statistics, workspace, threads);
  }
  static Status kCuda(const Problem& problem, const Arrays& arrays, void* workspace, void* stream) {
    return cuda::GradientNormalize(problem, arrays, arrays.statistics, workspace, stream);
  }
};

}  // namespace tfops

#endif  // TFOPS_BATCH_NORM_CALLS_H_
