// The on-chip tiers: a group of blocks reads a slab of channels once, keeps it in shared memory while it finds the
// moments, and writes the result from there. Host code without CUDA.
//
//   one block  the group is one block
//   cluster    the blocks of a cluster, which merge their moments through distributed shared memory
//   grid       all blocks of a cooperative launch; each slab's merge theirs through device memory, after a grid barrier
//
// Blocks: those of a group are neighbours in grid.x, and share the slab's steps equally. A thread keeps the vectors
// that it has read, and no other thread looks at them: held[array][step][thread].

#ifndef TFOPS_BATCH_NORM_CUDA_ONCHIP_H_
#define TFOPS_BATCH_NORM_CUDA_ONCHIP_H_

#include <cstdint>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/tiling.h"
#include "csrc/batch_norm/portable.h"

namespace tfops::cuda {

enum class Scope { kBlock, kCluster, kGrid };

struct OnChip : Tiling {
  Scope scope = Scope::kBlock;
  int threads = 0;  // a block's, of which block.x * block.y * block.z have work
  int group = 1;    // blocks that share a slab
  int slab_channels = 0;
  int held_steps = 0;  // that a block takes at most
  bool holds_residual = false;

  // The sum over a block: `entries` threads have a number for each of `slots` slots, units in rows and channels in
  // planes. `parts` threads for each slot sum the entries; then one thread for each channel sums its slots and parts.
  int slots = 0;
  int entries = 0;
  int parts = 0;

  // Offsets in a block's dynamic shared memory, in bytes; 16-byte aligned.
  int totals_at = 0;    // double[2][slab_channels]: sums of the block
  int own_at = 0;       // the block's partial results [slab_channels], for others of its cluster to read
  int channels_at = 0;  // coefficients F[3][slab_channels] of the channels
  int scratch_at = 0;   // the numbers to be summed, and the sums of the parts; later the group's partial results
  int parts_at = 0;
  int bits_at = 0;  // activation bits [step][thread], a byte for each vector
  int held_at = 0;
  int shared_bytes = 0;

  int64_t Blocks() const { return slabs * group; }
  // Items that blocks exchange through device memory.
  int64_t ExchangedItems() const { return scope == Scope::kGrid && group > 1 ? Blocks() * slab_channels : 0; }
  // The first step of the slab that block `rank` of a group takes.
  TFOPS_INLINE int64_t FirstStep(int64_t rank) const { return steps * rank / group; }
};

enum class Pass { kForward, kBackward };

// Completes a plan of which the tiling, scope, group and threads are set. What does not fit shows in shared_bytes
// alone.
void LayOut(const Problem& problem, Pass pass, int64_t shared_limit, OnChip* plan);

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_ONCHIP_H_
