// The streaming tier: how the elements of a tensor map to blocks and threads. Host code without CUDA.
//
// Each phase is a kernel that walks over the whole tensor, in 16-byte vectors where alignment and sizes allow that,
// else element by element. A step of a block is one vector for each of its threads:
//
//   rows    inner == 1. Threads (x, z): x along the channels of a row, z down the rows. Each lane of a vector is a
//           channel of its own. Blocks beside each other (grid.x) take the channels slab by slab.
//   planes  inner > 1. Threads (x, y, z): x along a plane's inner elements, y over neighbouring channels, z over outer.
//           All of a thread's elements belong to one channel. Blocks beside each other take blockDim.y channels each.
//
// The steps that lead through a slab are numbered, inner fastest, and cut into `splits` (grid.y) equal ranges.
// One channel is one plane, so that its count, however odd, costs no idle threads.

#ifndef TFOPS_BATCH_NORM_CUDA_STREAMING_H_
#define TFOPS_BATCH_NORM_CUDA_STREAMING_H_

#include <cstddef>
#include <cstdint>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/extent.h"

namespace tfops::cuda {

struct Tiling {
  bool planes = false;
  int64_t outer = 0;     // of the folded problem, as the next two
  int64_t channels = 0;  // 1 in a tensor of one channel, and then outer is 1 too
  int64_t inner = 0;
  int64_t mask_row_bytes = 0;

  int steps_across = 0;       // steps along the inner elements of a plane; 1 for rows
  int64_t steps = 0;          // of a slab
  int64_t split_steps = 0;    // of each split but the last, which may have fewer
  int64_t stride_across = 0;  // elements from one step to the next along a plane
  int64_t stride_down = 0;    // elements from the last step along a plane to the first one `block.z` further out

  Extent block;
  Extent grid;

  int64_t Splits() const { return grid.y; }
};

// For a problem with at least one element, and vectors of `lanes` elements.
Tiling MakeTiling(const Problem& problem, int lanes, int multiprocessors);

// Whether every array is aligned to 16 bytes, null included, and a row of the problem has a multiple of `lanes`
// elements.
bool CanVectorize(const Problem& problem, int lanes, const void* const* arrays, int count);

// The bytes of one item for each split and channel, whichever vectors will be chosen.
size_t SplitBytes(const Problem& problem, size_t item_bytes, int multiprocessors);

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_STREAMING_H_
