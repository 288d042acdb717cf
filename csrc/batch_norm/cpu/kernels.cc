// The CPU kernels. Compiled once for each instruction set, as namespace TFOPS_CPU_LEVEL, and in each for every data
// type, TFOPS_CPU_DATA_TYPE: as files of their own they compile side by side.

#include "csrc/batch_norm/cpu/kernels.h"

#include "csrc/batch_norm/cpu/channels.h"
#include "csrc/batch_norm/cpu/gradient_moments.h"
#include "csrc/batch_norm/cpu/gradient_normalize.h"
#include "csrc/batch_norm/cpu/masked.h"
#include "csrc/batch_norm/cpu/moments.h"
#include "csrc/batch_norm/cpu/normalize.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

template <typename T>
class KernelsFor final : public Kernels {
  using P = Param<T>;

 public:
  void Moments(const ForwardJob& job, int64_t item) const override {
    job.mask.flags ? MaskedMoments<T>(job, item) : PartialMoments<T>(job, item);
  }
  void FinishStatistics(const ForwardJob& job, int64_t begin, int64_t end) const override {
    FinishStatisticsOf<P>(job, begin, end);
  }
  void Normalize(const ForwardJob& job, int64_t item) const override { NormalizeItem<T>(job, item); }

  void PrepareGradient(const BackwardJob& job, int64_t begin, int64_t end) const override {
    PrepareGradientOf<P>(job, begin, end);
  }
  void GradientMoments(const BackwardJob& job, int64_t item) const override { PartialGradientMoments<T>(job, item); }
  void FinishGradient(const BackwardJob& job, int64_t begin, int64_t end) const override {
    FinishGradientOf<P>(job, begin, end);
  }
  void GradientNormalize(const BackwardJob& job, int64_t item) const override {
    job.mask.flags ? MaskedGradientNormalize<T>(job, item) : GradientNormalizeItem<T>(job, item);
  }

  void FinishMoments(const ForwardJob& job, int64_t begin, int64_t end) const override {
    FinishMomentsOf<P>(job, begin, end);
  }
  void TakeStatisticsGradient(const BackwardJob& job, int64_t begin, int64_t end) const override {
    TakeStatisticsGradientOf<P>(job, begin, end);
  }

  void MergeVirtualBatches(const ForwardJob& job, int64_t begin, int64_t end) const override {
    AverageVirtualBatches<P>(job, begin, end);
  }
  void MergeVirtualBatches(const BackwardJob& job, int64_t begin, int64_t end) const override {
    AddVirtualBatches<P>(job, begin, end);
  }
};

}  // namespace

template <>
const Kernels& KernelsOf<DataType::TFOPS_CPU_DATA_TYPE>() {
  static const KernelsFor<ElementOf<DataType::TFOPS_CPU_DATA_TYPE>> kernels;
  return kernels;
}

}  // namespace tfops::cpu::TFOPS_CPU_LEVEL
