// The on-chip tiers: a group of blocks keeps a slab of channels on the chip while it finds the moments, and makes the
// result from there. Host code without CUDA.
//
//   one block  the group is one block
//   cluster    the blocks of a cluster, which meet through distributed shared memory
//   grid       all blocks of a cooperative launch; each slab's meet through device memory and a grid barrier
//
// Blocks: those of a group are neighbours in grid.x, and share the slab's steps equally; grid.z is over virtual
// batches, of which the grid's tier takes one only, for all blocks of that are resident at once. A thread keeps the
// vectors of its first steps in registers, and those of the next ones in shared memory, where no other thread looks at
// them. What there is no room for it reads again for the result: the last first, for that is what L2 still has.
//
//     steps of a block's share:   0 1 2 ...    | ...                    | ...               n - 1
//     where their vectors are:    registers    | shared memory          | memory, or L2
//     first, for the sums:        --> read     | --> copied, then read  | --> read
//     then, for the result:       <-----------------------------------------------------------
//
// The blocks of a group meet twice. Each merges the partial results of a share of the slab's channels (those from
// FirstToMerge(rank) on), and gives the others what these channels need.

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

  // A block has share_steps steps at most, of which so many are in registers, and so many in shared memory.
  int share_steps = 0;
  int register_steps = 0;
  int shared_steps = 0;
  bool keeps_residual = false;  // the forward pass', of all steps in shared memory

  // Offsets in a block's dynamic shared memory, in bytes; 16-byte aligned.
  int totals_at = 0;    // double[2 or 4][slab channels]: sums of the block, in the backward or the forward pass
  int own_at = 0;       // the block's partial results [slab channels], for others of its cluster to read
  int channels_at = 0;  // coefficients F[2 or 3][slab channels]
  int numbers_at = 0;   // the numbers to be summed, and the sums of the parts: see BlockSums
  int parts_at = 0;
  int bits_at = 0;      // activation bits [share_steps][threads], a byte for each vector
  int kept_at = 0;      // vectors [array][shared_steps][threads]
  int residual_at = 0;  // vectors [share_steps][threads]
  int shared_bytes = 0;

  int SlabChannels() const { return sums.results; }
  int64_t Blocks() const { return slabs * group; }
  // Items that blocks exchange through device memory: their partial results, and the coefficients that come of them.
  int64_t ExchangedItems() const { return scope == Scope::kGrid && group > 1 ? (Blocks() + slabs) * sums.results : 0; }
  // The first step of the slab that block `rank` of a group takes.
  TFOPS_INLINE int64_t FirstStep(int64_t rank) const { return steps * rank / group; }
  // The first channel of the slab whose partial results it merges.
  TFOPS_INLINE int FirstToMerge(int rank) const {
    return static_cast<int>(static_cast<int64_t>(sums.results) * rank / group);
  }
  // The part of what a share reads for its sums that it has to read again.
  double ReadAgain() const { return 1 - static_cast<double>(register_steps + shared_steps) / share_steps; }
};

enum class Pass { kForward, kBackward };

// Completes a plan of which the tiling, scope, group and threads are set. `room`: bytes of shared memory that a block
// may have. If not even what sums and exchange need has room, shared_bytes is more than that.
void LayOut(const Problem& problem, Pass pass, int64_t room, OnChip* plan);

// Vectors of each array that a thread of the kernel for so many lanes can keep in registers.
int KeptInRegisters(Pass pass, int lanes);

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_ONCHIP_H_
