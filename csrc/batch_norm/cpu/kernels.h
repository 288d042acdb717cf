// What a file of CPU kernels offers: the work of one item of each phase. cpu.cc calls them, in parallel.

#ifndef TFOPS_BATCH_NORM_CPU_KERNELS_H_
#define TFOPS_BATCH_NORM_CPU_KERNELS_H_

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cpu/partition.h"

namespace tfops::cpu {

// [chunks, columns]: what each chunk of rows contributes to a column.
struct Partials {
  double* first = nullptr;   // mean of x; or sum of dz
  double* second = nullptr;  // m2 of x; or sum of dz * (x - mean)
};

// [columns], of the param type: y = act((x - mean) * slope + offset + residual); dx = dz * slope + (x - mean) * tilt +
// shift.
struct Coefficients {
  void* mean = nullptr;
  void* slope = nullptr;
  void* offset = nullptr;
  void* tilt = nullptr;
  void* shift = nullptr;
};

// How a job goes through its rows by tiles, if it does; see runs.h. kApart: nothing is streamed, or fetched ahead.
enum class Traversal { kNone, kApart, kStreamed };

// stream: the output goes past the cache, which is too small for it and what was read. ahead: that input, or a pass's
// inputs, are fetched from memory so many elements before they are read; 0 if they are not.
struct ForwardJob {
  Problem problem;
  Partition partition;
  bool stream_y = false;
  int64_t x_ahead = 0;  // in the pass that writes y, as the next
  int64_t residual_ahead = 0;
  Traversal traversal = Traversal::kNone;
  ForwardArrays arrays;
  Partials partials;
  Coefficients coefficients;
};

struct BackwardJob {
  Problem problem;
  Partition partition;
  bool stream_dx = false;
  bool stream_dresidual = false;
  int64_t sums_ahead = 0;
  int64_t dx_ahead = 0;
  Traversal traversal = Traversal::kNone;
  BackwardArrays arrays;
  Partials partials;
  Coefficients coefficients;
};

// counts: [chunks, columns], how many elements count in each chunk of a column.
struct MomentsJob {
  ForwardJob forward;
  MomentsArrays arrays;
  double* counts = nullptr;
};

// For one data type. Finish functions take a range of channels, the others an item of the partition.
struct Kernels {
  void (*moments)(const ForwardJob& job, int64_t item);
  void (*finish_statistics)(const ForwardJob& job, int64_t begin, int64_t end);
  void (*normalize)(const ForwardJob& job, int64_t item);
  void (*prepare_gradient)(const BackwardJob& job, int64_t begin, int64_t end);
  void (*gradient_moments)(const BackwardJob& job, int64_t item);
  void (*finish_gradient)(const BackwardJob& job, int64_t begin, int64_t end);
  void (*gradient_normalize)(const BackwardJob& job, int64_t item);
  // For the phases by themselves.
  void (*masked_moments)(const MomentsJob& job, int64_t item);
  void (*finish_moments)(const MomentsJob& job, int64_t begin, int64_t end);
  void (*spread_statistics_gradient)(const BackwardJob& job, const StatisticsGradient& statistics, int64_t begin,
                                     int64_t end);
  void (*masked_gradient_normalize)(const BackwardJob& job, const Mask& mask, int64_t item);
};

// Those of each instruction set. A build has some of them (TFOPS_CPU_LEVELS in CMake), and defines TFOPS_HAS_ and the
// name for each.
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
