// Every constant that was chosen for speed. The algorithm is right with any other choice.

#ifndef TFOPS_BATCH_NORM_CUDA_TUNING_H_
#define TFOPS_BATCH_NORM_CUDA_TUNING_H_

#include <cstdint>

namespace tfops::cuda {

struct Tuning {
  // Elements in a chain of sums of one thread: the longer, the more rounding error, and the less often to close one.
  static constexpr int kChain = 64;
};

// The streaming tier, whose kernels read the tensor from memory once in each phase.
struct StreamingTuning {
  static constexpr int kThreads = 256;
  // Resident blocks a multiprocessor that registers are capped for: 2 * 256 threads with 128 registers each.
  static constexpr int kBlocks = 2;
  // A grid has at most so many times the blocks that can be resident. More balance the load better; each costs a block
  // reduction and a merge later.
  static constexpr int kWaves = 4;
  // Vectors that a thread takes at least, before more blocks are made.
  static constexpr int kMinSteps = 16;
};

// Vectors that a thread has in flight, from each array, before it uses the first. An H200 hides its memory's latency
// with some 30 KB in flight a multiprocessor; 512 threads with 4 vectors of 16 bytes each have 32 KB. What registers
// allow depends on the lanes: each has sums and coefficients of its own.
template <int kLanes>
struct StreamingBatch {
  static constexpr int kMoments = 8;                                              // of x
  static constexpr int kNormalize = kLanes == 1 ? 8 : 4;                          // of x and residual
  static constexpr int kGradientMoments = kLanes == 1 ? 8 : kLanes == 8 ? 2 : 4;  // of dy, x and residual
  static constexpr int kGradientNormalize = kLanes == 1 ? 8 : 2;                  // of the same
};

// The merge of the splits: a block takes kChannels channels, and kThreads threads share each one's splits.
struct FinishTuning {
  static constexpr int kChannels = 8;
  static constexpr int kThreads = 32;
};

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_TUNING_H_
