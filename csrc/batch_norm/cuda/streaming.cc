// The tilings of the streaming tier.

#include "csrc/batch_norm/cuda/streaming.h"

#include <algorithm>

#include "csrc/batch_norm/cuda/tuning.h"

namespace tfops::cuda {
namespace {

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The least power of two that is >= n, but at most `limit`, a power of two.
int PowerOfTwo(int64_t n, int limit) {
  int power = 1;
  while (power < n && power < limit) power *= 2;
  return power;
}

// Threads along a row of `vectors` vectors: the widest power of two that leaves at most a quarter of the threads
// without work, for wide is good for memory; where there is none, whatever leaves the fewest.
int ChooseWidth(int64_t vectors, int least, int most) {
  int best = 0;
  int64_t best_padded = 0;
  for (int width = std::max(PowerOfTwo(vectors, most), least); width >= least; width /= 2) {
    const int64_t padded = DivideUp(vectors, width) * width;
    if (padded * 3 <= vectors * 4) return width;
    if (best == 0 || padded < best_padded) {
      best = width;
      best_padded = padded;
    }
  }
  return best;
}

}  // namespace

Tiling MakeTiling(const Problem& problem, int lanes, int multiprocessors) {
  constexpr int kThreads = StreamingTuning::kThreads;
  Tiling tiling;
  const bool one_channel = problem.channels == 1;
  tiling.planes = one_channel || problem.inner > 1;
  tiling.outer = one_channel ? 1 : problem.outer;
  tiling.channels = problem.channels;
  tiling.inner = one_channel ? problem.Elements() : problem.inner;
  tiling.mask_row_bytes = LayoutOfMask(problem).row_bytes;

  // Threads that share a byte of the mask are neighbours in a warp. Narrow vectors need more of them for a wide access.
  const int64_t vectors = DivideUp(tiling.planes ? tiling.inner : tiling.channels, lanes);
  const int least = std::max(PowerOfTwo(vectors, lanes > 1 ? 4 : 16), NeedsMask(problem) ? 8 / lanes : 1);
  tiling.block.x = ChooseWidth(vectors, least, tiling.planes ? kThreads : 32);
  tiling.block.y = tiling.planes ? PowerOfTwo(tiling.channels, kThreads / tiling.block.x) : 1;
  tiling.block.z = std::min(kThreads / (tiling.block.x * tiling.block.y), 64);  // CUDA's limit

  const int64_t slabs = tiling.planes ? DivideUp(tiling.channels, tiling.block.y) : DivideUp(vectors, tiling.block.x);
  const int64_t steps_across = tiling.planes ? DivideUp(vectors, tiling.block.x) : 1;
  const int64_t row_elements = tiling.channels * tiling.inner;
  tiling.steps_across = static_cast<int>(steps_across);
  tiling.steps = DivideUp(tiling.outer, tiling.block.z) * steps_across;
  tiling.stride_across = int64_t{tiling.block.x} * lanes;
  tiling.stride_down = tiling.block.z * row_elements - (steps_across - 1) * tiling.stride_across;

  // Whole waves of resident blocks, if there is work for one.
  const int64_t resident = int64_t{multiprocessors} * StreamingTuning::kBlocks;
  int64_t blocks = std::min(StreamingTuning::kWaves * resident, slabs * tiling.steps / StreamingTuning::kMinSteps);
  if (blocks > resident) blocks -= blocks % resident;
  const int64_t splits = std::min(std::max(blocks / slabs, int64_t{1}), tiling.steps);
  tiling.split_steps = DivideUp(tiling.steps, splits);
  tiling.grid.x = static_cast<int>(slabs);
  tiling.grid.y = static_cast<int>(DivideUp(tiling.steps, tiling.split_steps));
  return tiling;
}

bool CanVectorize(const Problem& problem, int lanes, const void* const* arrays, int count) {
  const int64_t row = problem.channels == 1 ? problem.Elements()
                      : problem.inner == 1  ? problem.channels
                                            : problem.inner;
  if (row % lanes != 0) return false;
  return std::all_of(arrays, arrays + count,
                     [](const void* array) { return reinterpret_cast<uintptr_t>(array) % 16 == 0; });
}

size_t SplitBytes(const Problem& problem, size_t item_bytes, int multiprocessors) {
  if (problem.Elements() == 0) return 0;
  int64_t splits = 0;
  for (int lanes : {1, 2, 4, 8}) splits = std::max(splits, MakeTiling(problem, lanes, multiprocessors).Splits());
  return static_cast<size_t>(splits * problem.channels) * item_bytes;
}

}  // namespace tfops::cuda
