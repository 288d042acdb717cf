// Every constant that was chosen for speed. The algorithm is right with any other choice.

#ifndef TFOPS_BATCH_NORM_CUDA_TUNING_H_
#define TFOPS_BATCH_NORM_CUDA_TUNING_H_

#include <cstdint>

namespace tfops::cuda {

// Virtual batches that a launch can be over: what CUDA lets grid.z be.
inline constexpr int64_t kMostOfLaunch = 65535;

struct Tuning {
  // The elements in a chain of a thread's sums: the longer, the more rounding error, and the less often to close one.
  static constexpr int kChain = 64;
};

// The streaming tier, whose kernels read the tensor from memory once in each phase.
struct StreamingTuning {
  static constexpr int kThreads = 256;
  static constexpr int kWidth = 32;  // threads along a row at most
  // Resident blocks a multiprocessor that registers are capped for: 2 * 256 threads with 128 registers each.
  static constexpr int kBlocks = 2;
  // A grid has at most so many times the blocks that can be resident. More balance the load better; each costs a block
  // reduction and a merge later.
  static constexpr int kWaves = 4;
  // Vectors that a thread takes at least, before more blocks are made.
  static constexpr int kMinSteps = 16;
  // Elements that a unit has at least, where a channel has several: the results of each pass through memory.
  static constexpr int kMinFoldedRows = 64;
};

// Vectors that a thread has in flight, from each array, before it uses the first. An H200 hides its memory's latency
// with some 30 KB in flight a multiprocessor; 512 threads with 4 vectors of 16 bytes each have 32 KB. What registers
// allow depends on the lanes: each has sums and coefficients of its own.
template <int kLanes>
struct StreamingBatch {
  static constexpr int kMoments = 8;                                              // of x
  static constexpr int kNormalize = kLanes == 1 ? 8 : 4;                          // of x and residual
  static constexpr int kGradientMoments = kLanes == 1 ? 6 : kLanes == 4 ? 4 : 2;  // of dy, x and residual
  static constexpr int kGradientNormalize = kLanes == 1 ? 6 : 2;                  // of dy, x and residual
};

// The on-chip tiers, whose blocks keep what they read.
struct OnChipTuning {
  // A block's, which has all registers of a multiprocessor, 255 a thread: the fewer threads share them, the more is
  // left of them for what is to be kept. What the threads have in flight makes up for their number.
  static constexpr int kThreads = 256;
  // In so many groups what is kept in shared memory arrives, one summed after the other.
  static constexpr int kCopyGroups = 4;
  // Vectors that a thread has in flight, of each array that it does not keep: on their way to registers, half of them
  // where two arrays are read, and to L2.
  static constexpr int kInFlight = 8;
};

// Vectors of each array that a thread keeps in registers: the most for which ptxas spills on no architecture.
template <int kLanes>
struct OnChipVectors {
  static constexpr int kForward = kLanes == 2 ? 30 : 32;                      // of x
  static constexpr int kBackward = kLanes == 2 ? 14 : kLanes == 4 ? 16 : 15;  // of dy and x
};

// What the policy reckons with, in nanoseconds and bytes per nanosecond. Estimates for an H200, whose memory moves 4.3
// TB/s; a multiprocessor's share of that stands for other GPUs as well. Settings can change them (policy.h).
struct PolicyTuning {
  double launch = 2500;          // a kernel's start, from an empty stream
  double next_launch = 1200;     // from when the kernel before has ended
  double phase = 800;            // until the first bytes of a phase are here, or its last are away
  double merge = 700;            // sums over a block and what is made of them
  double cluster_barrier = 250;  // of which a group takes two
  double grid_barrier = 1250;    // likewise, with what a cooperative launch takes longer
  double merge_block = 8;        // for each block of a group
  double memory_rate = 32;       // of each multiprocessor while all are busy
  double latency = 800;          // of memory that is busy
  double own_rate = 56;          // of a multiprocessor while few are
  double cache_factor = 0.4;     // of the time, where L2 still has what is read again
  double cache_share = 0.6;      // of L2, that what is read again may fill
};

// The merge of the splits: a block's threads take a channel, or each of its warps one that has few partial results.
struct FinishTuning {
  static constexpr int kThreads = 128;
  static constexpr int kMostOfWarp = 64;
};

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_TUNING_H_
