// Batch normalization, free of any framework: the contract between the kernels and everything above.
//
// A tensor of any rank and layout folds to [outer, channels, inner], dense and row-major: channels-last
// input (NHWC, NDHWC, 2-D) has inner == 1, channels-first input (NCHW, NCDHW) has inner == the number of
// pixels, and any axis of any rank >= 2 is one of that general form. Statistics of a channel are taken
// over its outer * inner elements. All sizes and offsets are 64-bit and count elements, not bytes.
//
//   training   y = act((x - mean) * inv_std * scale + offset + residual),  mean and inv_std of the batch
//   inference  the same, with mean and variance given
//
// Training may take the batch for several virtual batches (ghost batch norm: Hoffer, Hubara and Soudry, "Train longer,
// generalize better", 2017), each of which has statistics of its own: see Problem::virtual_batches.
//
// Data are float16, bfloat16, float32 or float64. Parameters and statistics ("param type" below) are
// float32, or float64 with float64 data; so is all arithmetic. Pointers are to host memory in
// namespace cpu and to device memory in namespace cuda. An output may be the same array as an input of
// its own shape (y as x or residual, dx or dresidual as dy); no other overlap is allowed.

#ifndef TFOPS_BATCH_NORM_BATCH_NORM_H_
#define TFOPS_BATCH_NORM_BATCH_NORM_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "csrc/batch_norm/portable.h"

#define TFOPS_EXPORT __attribute__((visibility("default")))

namespace tfops {

enum class StatusCode {
  kOk,
  kInvalidArgument,  // the caller's mistake; the message names the argument and its value
  kUnavailable,      // not on this machine: no CUDA in this build, no GPU, a driver too old
  kInternal,         // a CUDA call failed
};

struct [[nodiscard]] Status {
  StatusCode code = StatusCode::kOk;
  std::string message;

  bool ok() const { return code == StatusCode::kOk; }
};

enum class DataType { kFloat16, kBFloat16, kFloat32, kFloat64 };

inline int ElementBytes(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat16:
    case DataType::kBFloat16:
      return 2;
    case DataType::kFloat32:
      return 4;
    case DataType::kFloat64:
      break;
  }
  return 8;
}

// Every activation: its name in C++, and its name for users. activation.h says what each is. Saved models and compiled
// programs hold their names and places: they stay, and others come behind them. The second of two with one name is for
// parameters that the first does not take.
#define TFOPS_ACTIVATIONS(ACTIVATION) \
  ACTIVATION(None, "")                \
  ACTIVATION(Relu, "relu")            \
  ACTIVATION(Relu6, "relu6")          \
  ACTIVATION(LeakyRelu, "leaky_relu") \
  ACTIVATION(Silu, "silu")            \
  ACTIVATION(HardSilu, "hard_silu")   \
  ACTIVATION(Gelu, "gelu")            \
  ACTIVATION(GeluTanh, "gelu_tanh")   \
  ACTIVATION(Elu, "elu")              \
  ACTIVATION(Selu, "selu")            \
  ACTIVATION(Tanh, "tanh")            \
  ACTIVATION(Sigmoid, "sigmoid")      \
  ACTIVATION(Softplus, "softplus")    \
  ACTIVATION(Mish, "mish")            \
  ACTIVATION(BoundedRelu, "relu")

enum class Activation {
#define TFOPS_ENUMERATOR(Name, text) k##Name,
  TFOPS_ACTIVATIONS(TFOPS_ENUMERATOR)
#undef TFOPS_ENUMERATOR
};

inline constexpr Activation kActivations[] = {
#define TFOPS_VALUE(Name, text) Activation::k##Name,
    TFOPS_ACTIVATIONS(TFOPS_VALUE)
#undef TFOPS_VALUE
};

TFOPS_EXPORT const char* NameOf(Activation activation);

struct Problem {
  int64_t outer = 0;
  int64_t channels = 0;
  int64_t inner = 1;
  DataType dtype = DataType::kFloat32;
  Activation activation = Activation::kNone;
  double negative_slope = 0.2;  // of leaky_relu, which rounds it to a float, and of BoundedRelu
  double max_value = std::numeric_limits<double>::infinity();  // of BoundedRelu
  double threshold = 0;                                        // of BoundedRelu
  double alpha = 1;                                            // of elu
  bool has_residual = false;
  bool training = true;
  double epsilon = 1e-3;
  double exponential_avg_factor = 1.0;  // training: mean_out = (1 - factor) * mean_in + factor * batch mean
  bool unbiased = true;                 // training: variance_out takes m2 / (n - 1), else m2 / n
  // Training: `outer` is of so many virtual batches one after the other, each with statistics of its own. mean_out and
  // variance_out take in their average, and dscale and doffset are sums over all. 0 if, and only if, there is none in
  // an `outer` of 0.
  int64_t virtual_batches = 1;
  bool in_place = false;  // training: the gradient reads y in the place of x; see BackwardArrays

  // Elements of a channel in a virtual batch.
  TFOPS_INLINE int64_t Count() const { return (virtual_batches > 1 ? outer / virtual_batches : outer) * inner; }
  TFOPS_INLINE int64_t Elements() const { return outer * channels * inner; }
};

// Sets outer, channels and inner from a shape. InvalidArgument if rank < 2, if axis is outside
// [-rank, rank), if a dimension is negative, or if the number of elements exceeds 2^62.
TFOPS_EXPORT Status Fold(const int64_t* dims, int rank, int64_t axis, Problem* problem);

// Sets virtual_batches from a shape, an axis that Fold accepted, and the entries of dimension 0 that a virtual batch
// has; 0 of them means that there are no virtual batches. InvalidArgument if the size is negative or does not divide
// dimension 0, or if that has the channels.
TFOPS_EXPORT Status SetVirtualBatches(const int64_t* dims, int rank, int64_t axis, int64_t virtual_batch_size,
                                      Problem* problem);

// InvalidArgument unless epsilon is finite and >= 0, exponential_avg_factor is in [0, 1], the activation's parameters
// are numbers with 0 <= threshold < max_value, and finite but for that, and virtual_batches divides `outer`, or is 1 if
// it is not training. in_place takes training, an activation that has an inverse (IsInvertible in in_place.h) with
// parameters > 0, no residual and no virtual batches. (With epsilon == 0 a channel without variance comes out NaN, and
// no other does.)
TFOPS_EXPORT Status Validate(const Problem& problem);
// Likewise for BatchMoments(), whose problem may be training, but has no virtual batches.
TFOPS_EXPORT Status ValidateMoments(const Problem& problem);

// Sets the activation and its parameters from a name, which parameters may follow as in a call in Python:
// "leaky_relu(negative_slope=0.1)", "elu(alpha=0.5)", "relu(max_value=20, negative_slope=0.1, threshold=1)", all or
// some of them in any order. InvalidArgument if it is none.
TFOPS_EXPORT Status ParseActivation(const std::string& text, Problem* problem);

// What the gradient needs, beside x, to know act' at an element.
//   training with residual and a piecewise linear activation: activation bits, one for each element, written by the
//   forward pass, set where the activation has slope 1; x alone would not do, for residual is not kept;
//   every other problem: nothing (residual itself for smooth activations, and in inference where no bits are kept).
//
// Bits lie in rows, each of a whole number of bytes: a row is the contiguous run of `channels` elements if
// inner == 1, else of `inner`; one run of everything in a virtual batch if channels == 1. Bit i % 8 of byte i / 8
// belongs to element i of the row; bits past its end are zero.
struct ActivationBitsLayout {
  int64_t rows = 0;
  int64_t row_elements = 0;
  int64_t row_bytes = 0;

  int64_t Bytes() const { return rows * row_bytes; }
};
TFOPS_EXPORT bool NeedsActivationBits(const Problem& problem);  // the forward pass writes bits, the gradient reads them
TFOPS_EXPORT bool NeedsResidual(const Problem& problem);        // the gradient reads residual
TFOPS_EXPORT ActivationBitsLayout LayoutOfActivationBits(const Problem& problem);

// Whether the gradient of residual is another array than dy.
inline bool HasResidualGradient(const Problem& problem) {
  return problem.has_residual && problem.activation != Activation::kNone;
}

// Whether the running statistics may be left out in training: if nothing of them is kept.
inline bool MayLackRunning(const Problem& problem) { return problem.exponential_avg_factor == 1; }

// [N] is shorthand for the data's shape and type, [C] for a vector of `channels` of the param type, [V, C] for one in
// each virtual batch.
struct ForwardArrays {
  const void* x = nullptr;         // [N]
  const void* scale = nullptr;     // [C]
  const void* offset = nullptr;    // [C]
  const void* residual = nullptr;  // [N]; iff has_residual
  // [C]; in inference the statistics. In training the running statistics, which may be null if exponential_avg_factor
  // == 1; an empty batch then returns zeros.
  const void* mean = nullptr;
  const void* variance = nullptr;

  void* y = nullptr;                   // [N]
  void* mean_out = nullptr;            // [C]; training only, as are all below
  void* variance_out = nullptr;        // [C]
  void* saved_mean = nullptr;          // [V, C]; of the batch, for the gradient
  void* saved_inv_std = nullptr;       // [V, C]; 1 / sqrt(m2 / n + epsilon)
  uint8_t* activation_bits = nullptr;  // LayoutOfActivationBits(problem).Bytes(); iff NeedsActivationBits(problem)
};

// With dz = dy * act'(z), xc = x - mean, n = Count() and sums over a channel:
//   doffset = sum(dz)    dscale = inv_std * sum(dz * xc)    dresidual = dz
//   training   dx = scale * inv_std * (dz - sum(dz) / n - xc * inv_std^2 * sum(dz * xc) / n)
//                   + factor * (dmean / n + dvariance * xc * 2 / (n - 1, or n if not unbiased))
//              with factor divided by virtual_batches, and sums over a virtual batch but for doffset and dscale
//   inference  dx = scale * inv_std * dz
//              dmean_in = -scale * inv_std * sum(dz)
//              dvariance_in = -scale * inv_std^3 * sum(dz * xc) / 2
//
// in_place: x is the forward pass's y here, which then may have taken x's own array. xc is computed from it, as in
// in_place.h. A channel whose scale is too near 0 for that is refused: on the CPU Forward() returns InvalidArgument; a
// GPU cannot tell, and so, on either, the channel's dx and dscale are NaN.
struct BackwardArrays {
  const void* dy = nullptr;                  // [N]
  const void* x = nullptr;                   // [N]; in_place: y
  const void* scale = nullptr;               // [C]
  const void* offset = nullptr;              // [C]
  const void* mean = nullptr;                // [C]; training: saved_mean, [V, C]
  const void* inv_std = nullptr;             // [V, C]; training only: saved_inv_std
  const void* variance = nullptr;            // [C]; inference only
  const void* dmean = nullptr;               // [C]; training: gradient of mean_out, or null for none
  const void* dvariance = nullptr;           // [C]; training: gradient of variance_out, or null for none
  const void* residual = nullptr;            // [N]; iff NeedsResidual(problem)
  const uint8_t* activation_bits = nullptr;  // iff NeedsActivationBits(problem)

  void* dx = nullptr;            // [N]
  void* dscale = nullptr;        // [C]
  void* doffset = nullptr;       // [C]
  void* dmean_in = nullptr;      // [C]; inference only
  void* dvariance_in = nullptr;  // [C]; inference only
  void* dresidual = nullptr;     // [N]; null if it is not wanted, or dy itself (activation none)
};

// The phases by themselves, for statistics that are not simply those of a call's data: those of some of the elements,
// of several devices, or corrected. Forward: BatchMoments(), whatever makes mean and variance of its results, and
// Forward() in inference. Backward: GradientMoments() and GradientNormalize(), which are the two halves of Backward()
// in inference, and between them whatever makes tilt and shift of the gradients of mean and variance.

// Which elements count, as a mask of Keras' says: elements i * length to (i + 1) * length - 1 of the tensor, as it lies
// in memory, do where flags[i] is not 0.
struct Mask {
  const uint8_t* flags = nullptr;  // null: all elements count
  int64_t length = 1;              // `channels` where inner == 1, or a divisor of inner
};

struct MomentsArrays {
  const void* x = nullptr;  // [N]
  Mask mask;

  void* count = nullptr;     // [C]
  void* mean = nullptr;      // [C]; 0 where count is 0
  void* variance = nullptr;  // [C]; m2 / count; 0 where count is 0
};

// What the statistics add to dx at the elements that count: (x - mean) * tilt + shift.
struct StatisticsGradient {
  const void* tilt = nullptr;   // [C]
  const void* shift = nullptr;  // [C]
  Mask mask;
};

namespace cpu {

// The threads that a call may use: its own, and up to `helpers` more. schedule(task) has the task run on another
// thread, soon, late or never: a call shares its work with those that come in time, and does not wait for the others,
// which may run after it has returned and then find nothing to do. Results do not depend on who comes.
struct Threads {
  int helpers = 0;
  std::function<void(std::function<void()> task)> schedule;
};

// The workspace is scratch memory of the caller's, 64-byte aligned, that one call uses and leaves undefined.
TFOPS_EXPORT size_t ForwardWorkspaceBytes(const Problem& problem);
TFOPS_EXPORT size_t BackwardWorkspaceBytes(const Problem& problem);
TFOPS_EXPORT Status Forward(const Problem& problem, const ForwardArrays& arrays, void* workspace,
                            const Threads& threads);
TFOPS_EXPORT Status Backward(const Problem& problem, const BackwardArrays& arrays, void* workspace,
                             const Threads& threads);

// The problem of the gradient phases is one of inference. Their workspace is BackwardWorkspaceBytes(problem).
TFOPS_EXPORT size_t MomentsWorkspaceBytes(const Problem& problem);
TFOPS_EXPORT Status BatchMoments(const Problem& problem, const MomentsArrays& arrays, void* workspace,
                                 const Threads& threads);
// Writes all but dx and dresidual.
TFOPS_EXPORT Status GradientMoments(const Problem& problem, const BackwardArrays& arrays, void* workspace,
                                    const Threads& threads);
// Writes dx and dresidual.
TFOPS_EXPORT Status GradientNormalize(const Problem& problem, const BackwardArrays& arrays,
                                      const StatisticsGradient& statistics, void* workspace, const Threads& threads);

// The instruction set whose kernels run: "x86-64-v4", "x86-64-v3", "x86-64-v2", "neon" or "generic". It is the best
// that this build and this machine have, or what the environment variable TFOPS_CPU names, if they have that; "none" if
// the build is for another machine. (TFOPS_CPU_STREAMS, "many" or "few", likewise forces how tensors that are larger
// than the cache are gone through: see ../README.md.)
TFOPS_EXPORT const char* InstructionSet();

}  // namespace cpu

namespace cuda {

// All functions of this namespace act on the calling thread's current device, and return Unavailable in a build without
// CUDA. The pointers' alignment is that of their type, no more. Nothing here synchronizes.

// Whose workspace a call is for: the current GPU's, or the largest that any GPU of this machine would take (without a
// GPU, an H200's), for a program that is compiled before it is known where it runs.
enum class Gpus { kCurrent, kAny };
TFOPS_EXPORT Status ForwardWorkspaceBytes(const Problem& problem, size_t* bytes, Gpus gpus = Gpus::kCurrent);
TFOPS_EXPORT Status BackwardWorkspaceBytes(const Problem& problem, size_t* bytes, Gpus gpus = Gpus::kCurrent);
TFOPS_EXPORT Status Forward(const Problem& problem, const ForwardArrays& arrays, void* workspace, void* stream);
TFOPS_EXPORT Status Backward(const Problem& problem, const BackwardArrays& arrays, void* workspace, void* stream);

TFOPS_EXPORT Status MomentsWorkspaceBytes(const Problem& problem, size_t* bytes, Gpus gpus = Gpus::kCurrent);
TFOPS_EXPORT Status BatchMoments(const Problem& problem, const MomentsArrays& arrays, void* workspace, void* stream);
TFOPS_EXPORT Status GradientMoments(const Problem& problem, const BackwardArrays& arrays, void* workspace,
                                    void* stream);
TFOPS_EXPORT Status GradientNormalize(const Problem& problem, const BackwardArrays& arrays,
                                      const StatisticsGradient& statistics, void* workspace, void* stream);

// While one lives, the calls above launch nothing on its thread: they load the kernels that they would launch, and set
// these up. The same calls can then be captured in a CUDA graph, during which CUDA may refuse to load anything.
class TFOPS_EXPORT Rehearsal {
 public:
  Rehearsal();
  ~Rehearsal();
  Rehearsal(const Rehearsal&) = delete;
  Rehearsal& operator=(const Rehearsal&) = delete;
};

// What the choice of kernels depends on. The defaults are those of an H200.
struct Device {
  int compute_capability = 90;  // 90 for 9.0
  int multiprocessors = 132;
  int64_t shared_bytes_per_block = 227 << 10;  // the most that a block may have
  int64_t l2_bytes = 50 << 20;
  int largest_cluster = 16;  // blocks that can form a cluster; 1 on chips without clusters
  bool cooperative = true;   // all blocks of a grid can meet
  int number = -1;           // CUDA's, of a GPU that can be asked; -1: one on paper
};
TFOPS_EXPORT Status CurrentDevice(Device* device);

// How many blocks of one of the on-chip kernels a device runs at the same time, and what each may have. A block takes
// the registers of a whole multiprocessor.
struct Occupancy {
  static constexpr int kClusters[] = {2, 4, 8, 16};  // blocks of a cluster
  bool asked = false;                                // CUDA; else they are of a table
  int static_bytes = 0;                              // of shared memory, the kernel's own
  int64_t room = 0;                                  // bytes of dynamic shared memory
  int blocks = 0;
  int clusters[std::size(kClusters)] = {};
};
// Describes the occupancy of the on-chip kernels for a data type and pass.
TFOPS_EXPORT Status DescribeOccupancy(const Device& device, DataType dtype, bool backward, Occupancy* occupancy);

// The kernels for a problem, and why these. Tiers: "one_block", "cluster" and "grid" keep on the chip, between the
// phases, what they have room for of what they read; "streaming" keeps nothing.
struct Plan {
  std::string tier;
  std::string reason;
  int launches = 0;
  int lanes = 1;  // elements in each access to memory
  int threads = 0;
  int blocks = 0;
  int blocks_per_slab = 0;   // that share channels, and merge their moments
  int64_t shared_bytes = 0;  // of a block
  double read_again = 0;     // the part of what is read for sums that is read a second time; all of it in streaming
  int waves = 1;             // of blocks, one after the other, on the chip
  double nanoseconds = 0;    // that it is estimated to take
  int index = -1;            // among the plans on the chip that a problem has on a device; -1: streaming
};
// Plans without a GPU, too. `aligned`: all arrays are, to 16 bytes.
TFOPS_EXPORT Status MakePlan(const Problem& problem, bool backward, bool aligned, const Device& device, Plan* plan);

// The best plan of each tier, and of each size of clusters, that fits the device, by their estimates, fastest first.
// Whether a tier is forced does not matter.
TFOPS_EXPORT Status ListPlans(const Problem& problem, bool backward, bool aligned, const Device& device,
                              std::vector<Plan>* plans);
// What the plan of that index is estimated to take, by other constants (those that `tuning` names).
TFOPS_EXPORT Status PlanTime(const Problem& problem, bool backward, bool aligned, const Device& device, int index,
                             const std::map<std::string, double>& tuning, double* nanoseconds);

// What the choice depends on beside problem and device, the same for the whole process. At first what the environment
// variables TFOPS_TIER and TFOPS_FREE_MULTIPROCESSORS say, which are read once; if they are wrong, calls return
// InvalidArgument.
struct PolicySettings {
  std::string tier;  // of the passes that take statistics or sums, which all but inference's forward pass do; "": any
  int cluster = 0;   // of tier "cluster": its size; 0: any
  int free_multiprocessors = 0;          // that the grids of tier "grid" leave to others
  std::map<std::string, double> tuning;  // constants of the estimates, by their names in PolicyTuning
};
TFOPS_EXPORT PolicySettings GetPolicySettings();
// Changes the settings; constants that are not named stay as they are. InvalidArgument, and no change, if a setting is
// wrong. Forgets refusals.
TFOPS_EXPORT Status SetPolicySettings(const PolicySettings& settings);

// Calls since the process began or ResetLaunches(), by the tier that ran; inference and single phases count as
// streaming's. A refusal is a launch on the chip that CUDA would not start: streaming did the work, and does it from
// then on for that problem. The first of each kind is written to stderr.
struct Refusal {
  std::string tier;
  std::string pass;
  std::string error;
  std::string problem;  // the first
  int64_t count = 0;
};
struct Launches {
  std::map<std::string, int64_t> calls;  // by tier
  std::vector<Refusal> refusals;
};
TFOPS_EXPORT Launches GetLaunches();
TFOPS_EXPORT void ResetLaunches();

struct BuildInfo {
  bool built = false;
  std::string toolkit;        // such as "13.0"
  std::string architectures;  // such as "75-real 90-real 120": all as CMake names them
  std::string driver_needed;  // the CUDA version that a driver has to serve at least, such as "13.0"
};
TFOPS_EXPORT BuildInfo Build();

struct Gpu {
  std::string name;
  int compute_capability = 0;  // 90 for 9.0
  int multiprocessors = 0;
  int64_t memory_bytes = 0;
};
// The driver's CUDA version (13000 for 13.0; 0 if there is no driver) and the number of GPUs that kernels can run on.
// Unavailable, saying why, if there is none.
TFOPS_EXPORT Status Driver(int* version, int* gpus);
TFOPS_EXPORT Status Describe(int index, Gpu* gpu);
// The driver's version alone: Unavailable, saying why, if it is too old or there is none. It leaves CUDA as it was, not
// initialized, and so may be asked before a process forks.
TFOPS_EXPORT Status CheckDriver(int* version);
// Whether kernels can run on this GPU: Unavailable, saying why, if not. It takes up the GPU's context.
TFOPS_EXPORT Status CheckGpu(int index);

}  // namespace cuda
}  // namespace tfops

#endif  // TFOPS_BATCH_NORM_BATCH_NORM_H_
