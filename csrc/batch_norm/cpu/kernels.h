// What the kernels of an instruction set and a data type do, one item or some channels at a time. cpu.cc calls them, in
// parallel.

#ifndef TFOPS_BATCH_NORM_CPU_KERNELS_H_
#define TFOPS_BATCH_NORM_CPU_KERNELS_H_

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cpu/partition.h"

namespace tfops::cpu {

// [chunks, columns]: what each chunk of rows contributes to a column.
struct Partials {
  double* first = nullptr;   // mean of x; or sum of dz
  double* second = nullptr;  // m2 of x; or sum of dz * (x - mean)
  double* count = nullptr;   // elements that the mask lets through; only of moments with a mask
};

// The coefficients of y = act((x - mean) * slope + offset + residual) and of dx = dz * slope + (x - mean) * tilt +
// shift. The first kCoefficientsOfZ are those of y. In place, the gradient has 1 / slope for kMean.
enum Coefficient { kMean, kSlope, kOffset, kTilt, kShift, kCoefficients };
constexpr int kCoefficientsOfZ = kTilt;

// Each is [columns], of the param type.
using Coefficients = void* [kCoefficients];

// How the rows of channels-last data are gone through: one by one, or by tiles (see tiles.h), whose outputs may be
// streamed.
enum class Traversal { kRows, kTiles, kStreamedTiles };

// What a call is to do, to the first of its virtual batches, of which it most often has but one; OfVirtualBatch()
// (jobs.h) makes it another's. "Streamed" outputs go past the cache, which is too small for them and what is read.
// "Ahead" is by how many elements inputs are fetched from memory before they are read; 0 if they are not.
struct Job {
  Problem whole;    // as it was given
  Problem problem;  // of a virtual batch
  Partition partition;
  Traversal traversal = Traversal::kRows;
  Mask mask;  // the elements that count, in the phases by themselves
  Partials partials;
  Coefficients coefficients = {};
  int64_t partials_apart = 0;      // from one virtual batch's partials to the next one's
  int64_t coefficients_apart = 0;  // likewise
};

struct ForwardJob : Job {
  ForwardArrays arrays;
  MomentsArrays moments;  // where the phase by itself writes its results
  bool stream_y = false;
  int64_t x_ahead = 0;  // in the pass that writes y; so is the next
  int64_t residual_ahead = 0;
};

struct BackwardJob : Job {
  BackwardArrays arrays;
  StatisticsGradient statistics;      // what the phase by itself is given
  bool has_statistics_terms = false;  // whether dx has tilt and shift
  bool stream_dx = false;
  bool stream_dresidual = false;
  int64_t sums_ahead = 0;
  int64_t dx_ahead = 0;
};

// Channels are ranges from `begin` to `end`, items those of the partition.
class Kernels {
 public:
  // The forward pass: partial moments, which become statistics and coefficients, and then y.
  virtual void Moments(const ForwardJob& job, int64_t item) const = 0;
  virtual void FinishStatistics(const ForwardJob& job, int64_t begin, int64_t end) const = 0;
  virtual void Normalize(const ForwardJob& job, int64_t item) const = 0;

  // The backward pass: coefficients of z, partial sums, which become gradients and the coefficients of dx, and then dx.
  virtual void PrepareGradient(const BackwardJob& job, int64_t begin, int64_t end) const = 0;
  virtual void GradientMoments(const BackwardJob& job, int64_t item) const = 0;
  virtual void FinishGradient(const BackwardJob& job, int64_t begin, int64_t end) const = 0;
  virtual void GradientNormalize(const BackwardJob& job, int64_t item) const = 0;

  // The phases by themselves: what moments come to, and dx's coefficients as they are given.
  virtual void FinishMoments(const ForwardJob& job, int64_t begin, int64_t end) const = 0;
  virtual void TakeStatisticsGradient(const BackwardJob& job, int64_t begin, int64_t end) const = 0;

  // What the finished virtual batches come to, in the vectors that they have in common.
  virtual void MergeVirtualBatches(const ForwardJob& job, int64_t begin, int64_t end) const = 0;
  virtual void MergeVirtualBatches(const BackwardJob& job, int64_t begin, int64_t end) const = 0;

 protected:
  ~Kernels() = default;
};

// The kernels of each instruction set. A build has some of them (TFOPS_CPU_LEVELS in CMake), and defines TFOPS_HAS_ and
// the name for each.
#define TFOPS_DECLARE_KERNELS(level)               \
  namespace level {                                \
  template <DataType kType>                        \
  const Kernels& KernelsOf();                      \
  template <>                                      \
  const Kernels& KernelsOf<DataType::kFloat16>();  \
  template <>                                      \
  const Kernels& KernelsOf<DataType::kBFloat16>(); \
  template <>                                      \
  const Kernels& KernelsOf<DataType::kFloat32>();  \
  template <>                                      \
  const Kernels& KernelsOf<DataType::kFloat64>();  \
  }
TFOPS_DECLARE_KERNELS(x86_64_v2)
TFOPS_DECLARE_KERNELS(x86_64_v3)
TFOPS_DECLARE_KERNELS(x86_64_v4)
TFOPS_DECLARE_KERNELS(neon)
TFOPS_DECLARE_KERNELS(generic)
#undef TFOPS_DECLARE_KERNELS

}  // namespace tfops::cpu

#endif  // TFOPS_BATCH_NORM_CPU_KERNELS_H_
