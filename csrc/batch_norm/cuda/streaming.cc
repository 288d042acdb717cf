// The tilings of the streaming tier.

#include "csrc/batch_norm/cuda/streaming.h"

#include <algorithm>

#include "csrc/batch_norm/cuda/tuning.h"

namespace tfops::cuda {
namespace {

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

StreamingTiling MakeStreamingTiling(const Problem& problem, bool aligned, int multiprocessors) {
  constexpr int kThreads = StreamingTuning::kThreads;
  // Each unit's results pass through memory: there have to be elements enough beside them.
  const int64_t batches = problem.virtual_batches;
  const int64_t most_units = std::min(problem.Elements() / batches / StreamingTuning::kMinFoldedRows, int64_t{1} << 30);
  const View view = MakeView(problem, aligned, most_units, false);

  // Threads that share a byte of activation bits are neighbours in a warp. Narrow vectors need more threads for a wide
  // access.
  const int64_t vectors = DivideUp(view.planes ? view.inner : view.units, view.lanes);
  const int least =
      std::max(PowerOfTwo(vectors, view.lanes > 1 ? 4 : 16), NeedsActivationBits(problem) ? 8 / view.lanes : 1);
  Extent block;
  block.x = ChooseWidth(vectors, least, view.planes ? kThreads : StreamingTuning::kWidth);
  block.y = view.planes ? PowerOfTwo(view.units, kThreads / block.x) : 1;
  block.z = std::min(kThreads / (block.x * block.y), 64);  // CUDA's limit

  StreamingTiling tiling;
  static_cast<Tiling&>(tiling) = MakeTiling(view, block, block.x * block.y * block.z, /*by_channel=*/false);
  // Whole waves of resident blocks, if there is work for one.
  const int64_t resident = int64_t{multiprocessors} * StreamingTuning::kBlocks;
  int64_t blocks =
      std::min(StreamingTuning::kWaves * resident, batches * tiling.slabs * tiling.steps / StreamingTuning::kMinSteps);
  if (blocks > resident) blocks -= blocks % resident;
  const int64_t splits = std::min(std::max(blocks / (batches * tiling.slabs), int64_t{1}), tiling.steps);
  tiling.split_steps = DivideUp(tiling.steps, splits);
  tiling.grid.x = static_cast<int>(tiling.slabs);
  tiling.grid.y = static_cast<int>(DivideUp(tiling.steps, tiling.split_steps));
  return tiling;
}

StreamingTiling MakeStreamingTiling(const Problem& problem, const Mask& mask, bool aligned, int multiprocessors) {
  constexpr int kVectorBytes = 16;
  const bool uniform = !mask.flags || mask.length % (kVectorBytes / ElementBytes(problem.dtype)) == 0;
  return MakeStreamingTiling(problem, aligned && uniform, multiprocessors);
}

int64_t SplitItems(const Problem& problem, bool aligned, int multiprocessors) {
  const StreamingTiling tiling = MakeStreamingTiling(problem, aligned, multiprocessors);
  return tiling.Splits() * tiling.units * problem.virtual_batches;
}

}  // namespace tfops::cuda
