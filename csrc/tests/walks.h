// Threads' walks through a tiling, one thread after the other. The kernels' own walk, with the stand-ins that csrc/simt
// has for CUDA's words; the machine behind them is not needed.

#ifndef TFOPS_TESTS_WALKS_H_
#define TFOPS_TESTS_WALKS_H_

#include <algorithm>
#include <cstdint>

#include "csrc/batch_norm/cuda/tiling.h"
#include "csrc/batch_norm/cuda/walk.cuh"
#include "csrc/tests/problems.h"

namespace tfops {

// Calls body(constant) with the number of lanes.
template <typename Body>
void WithLanes(int lanes, Body body) {
  if (lanes == 8) return body(std::integral_constant<int, 8>());
  if (lanes == 4) return body(std::integral_constant<int, 4>());
  if (lanes == 2) return body(std::integral_constant<int, 2>());
  body(std::integral_constant<int, 1>());
}

struct Step {
  int64_t slab;
  int64_t share;  // of the slab's steps
  int64_t step;
  int64_t virtual_batch = 0;
};

// Calls body(walk, step) for every vector that a block comes to, in `count` steps of its slab from at.step on. Threads
// without work, beyond block.z, are asked too.
template <cuda::Direction kDirection = cuda::Direction::kForward, typename Body>
void ForVectorsOfBlock(const cuda::Tiling& tiling, const Step& at, int64_t count, Body body) {
  WithLanes(tiling.lanes, [&](auto lanes) {
    for (cuda::Place place{0, 0, 0}; place.z <= tiling.block.z; ++place.z) {
      for (place.y = 0; place.y < tiling.block.y; ++place.y) {
        for (place.x = 0; place.x < tiling.block.x; ++place.x) {
          cuda::Walk<decltype(lanes)::value, kDirection> walk(tiling, place, at.slab, at.step, count, at.virtual_batch);
          for (int64_t i = 0; !walk.Done(); ++i, walk.Advance()) {
            const int64_t after = kDirection == cuda::Direction::kForward ? i : count - 1 - i;
            if (walk.Inside()) body(walk, Step{at.slab, at.share, at.step + after, at.virtual_batch});
          }
        }
      }
    }
  });
}

// Calls body(walk, step) for every vector of the tensor, or of that virtual batch, if blocks have `share_steps` steps
// of a slab each.
template <cuda::Direction kDirection = cuda::Direction::kForward, typename Body>
void ForVectors(const cuda::Tiling& tiling, int64_t share_steps, Body body, int64_t virtual_batch = 0) {
  for (int64_t slab = 0; slab < tiling.slabs; ++slab) {
    for (int64_t first = 0; first < tiling.steps; first += share_steps) {
      const int64_t count = std::min(share_steps, tiling.steps - first);
      ForVectorsOfBlock<kDirection>(tiling, Step{slab, first / share_steps, first, virtual_batch}, count, body);
    }
  }
}

// Threads of a block, for a view. With activation bits, those that share a byte of them are neighbours, and where rows
// were put together a block has whole ones.
inline cuda::Extent RandomBlock(const cuda::View& view, bool has_bits, Random* random) {
  const int64_t vectors = cuda::DivideUp(view.planes ? view.inner : view.units, view.lanes);
  const int unit = has_bits ? std::max(8 / view.lanes, 1) : 1;
  cuda::Extent block;
  block.x = static_cast<int>(random->Below(std::min<int64_t>(vectors, 256)) / unit + 1) * unit;
  block.y = view.planes ? static_cast<int>(random->Below(std::min<int64_t>(view.units, 8)) + 1) : 1;
  block.z = static_cast<int>(random->Below(std::min<int64_t>(view.outer, 16)) + 1);
  return block;
}

}  // namespace tfops

#endif  // TFOPS_TESTS_WALKS_H_
