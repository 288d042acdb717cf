// How the elements of a tensor map to vectors, threads and blocks. Host code without CUDA; for the kernels it is data.
//
// A thread reads and writes vectors of 16 bytes, or single elements where alignment or sizes forbid vectors. A block
// goes through a tensor in steps, in each of which every thread has one vector. There are two layouts, rows and planes.
// In the drawings a cell is a vector of 4 lanes, and names the thread of the block that has it.
//
// clang-format off
//
// Rows, and a block of 2 x 1 x 2 threads: x goes along a row, z down the rows. Each lane has a *unit* of its own, for
// which it sums up: a place in the row. A *slab* is the units that a step is wide, in all rows.
//
//             slab 0: units 0 to 7        slab 1: units 8 to 15
//           +-------------+-------------+-------------+-------------+
//   row 0   | x = 0 z = 0 | x = 1 z = 0 | x = 0 z = 0 | x = 1 z = 0 |   step 0 of each slab
//   row 1   | x = 0 z = 1 | x = 1 z = 1 | x = 0 z = 1 | x = 1 z = 1 |
//           +-------------+-------------+-------------+-------------+
//   row 2   | x = 0 z = 0 | x = 1 z = 0 | x = 0 z = 0 | x = 1 z = 0 |   step 1
//   row 3   | x = 0 z = 1 | x = 1 z = 1 | x = 0 z = 1 | x = 1 z = 1 |
//           +-------------+-------------+-------------+-------------+
//
// Planes of 16 elements, and a block of 2 x 2 x 1 threads: x goes along a plane, y over neighbouring channels, z over
// images. A unit is a channel, and all of a thread's elements are of one. A slab is block.y channels, in all images.
//
//             slab 0: channel 0             channel 1                        slab 1: channel 2
//           +-------+-------+-------+-------+-------+-------+-------+-------+-------+---
//   image 0 | x = 0 | x = 1 | x = 0 | x = 1 | x = 0 | x = 1 | x = 0 | x = 1 | x = 0 |
//           | y = 0 | y = 0 | y = 0 | y = 0 | y = 1 | y = 1 | y = 1 | y = 1 | y = 0 | ...
//           |     step 0    |     step 1    |     step 0    |     step 1    |     step 0
//           +-------+-------+-------+-------+-------+-------+-------+-------+-------+---
//   image 1 |     step 2    |     step 3    |     step 2    |     step 3    |     step 2
//
// clang-format on
//
// Channels-last tensors are rows, whose units are channels. Where such rows have no whole number of vectors, several
// are taken for one that has (`repeat`); and where planes have none, all planes of an image are taken for one row, in
// which `pixels` neighbours are of a channel. Either way a vector's lanes may be of different channels, and the units
// of a channel are merged at the end. A tensor of one channel is one plane.

#ifndef TFOPS_BATCH_NORM_CUDA_TILING_H_
#define TFOPS_BATCH_NORM_CUDA_TILING_H_

#include <cstdint>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/extent.h"
#include "csrc/batch_norm/portable.h"

namespace tfops::cuda {

// A tensor as the kernels see it, or with virtual batches one of these: grid.z of every launch is over them.
struct View {
  int lanes = 1;
  bool planes = false;
  int64_t outer = 0;              // rows, or planes of a channel
  int64_t channels = 0;           // of the problem
  int64_t inner = 0;              // planes: their elements
  int64_t units = 0;              // rows: their elements; planes: channels
  int repeat = 1;                 // rows: neighbours that are taken for one
  int pixels = 1;                 // rows: neighbours in a row that are of one channel
  int64_t bits_row_elements = 0;  // of the rows of activation bits; see LayoutOfActivationBits()
  int64_t bits_row_bytes = 0;
  int64_t bits_bytes = 0;  // all of them

  TFOPS_INLINE int64_t RowElements() const { return planes ? units * inner : units; }
  TFOPS_INLINE int64_t UnitsPerChannel() const { return int64_t{repeat} * pixels; }
  TFOPS_INLINE bool Folded() const { return UnitsPerChannel() > 1; }
};

// Vectors of 16 bytes if they can be had, for a problem with at least one element. `aligned`: every array is, to 16
// bytes. Rows are not put together to more than `most_units`, of at most 2^30; nor where there are activation bits,
// unless `fold_bits`, for then their rows are not the view's. Each virtual batch has to begin at 16 bytes, too.
View MakeView(const Problem& problem, bool aligned, int64_t most_units, bool fold_bits);

bool AllAligned(const void* const* arrays, int count);

// How a block sums up: so many threads have a number for each of a slab's units. `parts` threads for each unit add
// these; then one thread for each result adds the parts. Results are units, or channels, which have several units each
// where a view is folded.
//
//   numbers            parts              results
//   u0 u1 u2 u3   ->   u0 u1 u2 u3   ->   u0 + u1   u2 + u3      (of 4 units, 4 numbers and 2 parts, with channels of
//   u0 u1 u2 u3   |                                               2 units each)
//   u0 u1 u2 u3   ->   u0 u1 u2 u3
//   u0 u1 u2 u3   |
struct BlockSums {
  int units = 0;
  int numbers = 0;
  int parts = 0;
  int results = 0;
  int repeat = 1;  // unit (turn * results + result) * pixels + pixel of the slab, with turn < repeat, is of that result
  int pixels = 1;
};

struct Tiling : View {
  Extent block;
  BlockSums sums;
  int64_t slabs = 0;

  int steps_across = 0;       // steps along a plane; 1 for rows
  int64_t steps = 0;          // of a slab; those along a plane are neighbours
  int64_t stride_across = 0;  // elements from one step to the next along a plane
  int64_t stride_down = 0;    // elements from the last step along a plane to the first one `block.z` further out
};

// The rest of a tiling from its view and its threads: all of a block's, of which some may have no work. If by_channel,
// blocks sum up to channels, of which slabs have whole ones, else to units.
Tiling MakeTiling(const View& view, const Extent& block, int threads, bool by_channel);

inline int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_TILING_H_
