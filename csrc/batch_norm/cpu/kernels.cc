// The CPU kernels. Compiled once for each instruction set, as namespace TFOPS_CPU_LEVEL, and in each for every data
// type, TFOPS_CPU_DATA_TYPE: as files of their own they compile side by side.
//
//   moments             x -> partial mean, m2 of each column           rows, a few at a time, through sums of a chain;
//   gradient moments    dy, x -> partial sums of dz, dz * (x - mean)   chains join in double
//   normalize           x -> y, activation bits                        runs of contiguous elements
//   gradient normalize  dy, x -> dx, dresidual
//
// Chains are short (kChainRows additions), so rounding in float stays small; everything longer is in double. See
// partition.h for columns, rows and items, and ../moments.h for the arithmetic of a channel.

#include "csrc/batch_norm/cpu/kernels.h"

#include "csrc/batch_norm/cpu/gradient_pass.h"
#include "csrc/batch_norm/cpu/masked_pass.h"
#include "csrc/batch_norm/cpu/moments_pass.h"
#include "csrc/batch_norm/cpu/normalize_pass.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

template <DataType kType>
struct ElementOf;
template <>
struct ElementOf<DataType::kFloat16> {
  using Type = Half;
};
template <>
struct ElementOf<DataType::kBFloat16> {
  using Type = BFloat16;
};
template <>
struct ElementOf<DataType::kFloat32> {
  using Type = float;
};
template <>
struct ElementOf<DataType::kFloat64> {
  using Type = double;
};

}  // namespace

template <>
const Kernels& KernelsOf<DataType::TFOPS_CPU_DATA_TYPE>() {
  using T = ElementOf<DataType::TFOPS_CPU_DATA_TYPE>::Type;
  static constexpr Kernels kKernels = {&MomentsItem<T>,
                                       &FinishStatisticsOf<T>,
                                       &NormalizeItem<T>,
                                       &PrepareGradientOf<T>,
                                       &GradientMomentsItem<T>,
                                       &FinishGradientOf<T>,
                                       &GradientNormalizeItem<T>,
                                       &MaskedMomentsItem<T>,
                                       &FinishMomentsOf<T>,
                                       &SpreadStatisticsGradientOf<T>,
                                       &MaskedGradientNormalizeItem<T>};
  return kKernels;
}

}  // namespace tfops::cpu::TFOPS_CPU_LEVEL
