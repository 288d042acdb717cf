// The CPU kernels. Compiled once for each instruction set, as namespace TFOPS_CPU_LEVEL.
//
//   moments             x -> partial mean, m2 of each column           rows, a few at a time, through sums of a chain;
//   gradient moments    dy, x -> partial sums of dz, dz * (x - mean)   chains join in double
//   normalize           x -> y, mask                                   runs of contiguous elements
//   gradient normalize  dy, x -> dx, dresidual
//
// Chains are short (kChainRows additions), so rounding in float stays small; everything longer is in double. See plan.h
// for columns, rows and items, and ../moments.h for the arithmetic of a channel.

#include "csrc/batch_norm/cpu/kernels.h"

#include "csrc/batch_norm/cpu/gradient_pass.h"
#include "csrc/batch_norm/cpu/kept_pass.h"
#include "csrc/batch_norm/cpu/moments_pass.h"
#include "csrc/batch_norm/cpu/normalize_pass.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

template <typename T>
constexpr Kernels kKernels = {&MomentsItem<T>,
                              &FinishStatisticsOf<T>,
                              &NormalizeItem<T>,
                              &PrepareGradientOf<T>,
                              &GradientMomentsItem<T>,
                              &FinishGradientOf<T>,
                              &GradientNormalizeItem<T>,
                              &KeptMomentsItem<T>,
                              &FinishMomentsOf<T>,
                              &SpreadStatisticsGradientOf<T>,
                              &KeptGradientNormalizeItem<T>};

}  // namespace

const Kernels& KernelsFor(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat16:
      return kKernels<Half>;
    case DataType::kBFloat16:
      return kKernels<BFloat16>;
    case DataType::kFloat32:
      return kKernels<float>;
    case DataType::kFloat64:
      break;
  }
  return kKernels<double>;
}

}  // namespace tfops::cpu::TFOPS_CPU_LEVEL
