// Threads, warps, blocks: what the machine's parts share.

#ifndef TFOPS_SIMT_BLOCK_H_
#define TFOPS_SIMT_BLOCK_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "csrc/simt/fiber.h"
#include "csrc/simt/machine.h"
#include "csrc/simt/race.h"

namespace simt {

inline constexpr unsigned kWarp = 32;

enum class State { kReady, kWaitsForWarp, kWaitsForBlock, kWaitsForCluster, kWaitsForGrid, kReturned };

struct Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint3 index = {};
  unsigned linear = 0;
  State state = State::kReady;
  // Where the thread waits and, for its warp, in what operation, for which lanes, and with what value.
  Position position = {};
  const char* operation = nullptr;
  unsigned mask = 0;
  uint64_t deposit = 0;
  // Copies to shared memory that are not waited for yet, by groups; the last group is open.
  std::deque<std::deque<std::pair<void*, const void*>>> copies = {{}};
};

// A warp's accesses to global memory, put together from what its lanes do one after another: the n-th time that a lane
// comes to a place in the code belongs to the n-th time that the others do.
class WarpAccesses {
 public:
  // Whether the sector is new to the access that the lane takes part in.
  bool Add(const void* site, unsigned lane, uint64_t sector, bool first_of_lane);

 private:
  struct Site {
    const void* address;
    uint32_t times[kWarp] = {};
    std::vector<std::vector<uint64_t>> sectors;
  };
  std::vector<Site> sites_;
  size_t last_ = 0;
};

struct Warp {
  uint64_t exchanged[kWarp] = {};
  WarpAccesses accesses;
  LaneClocks lanes;
};

struct SharedVariable {
  std::unique_ptr<char[]> memory;
  size_t bytes;
};

struct Block {
  uint3 index = {};
  unsigned rank = 0;     // in its cluster
  unsigned cluster = 0;  // its place among those that run now
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  unsigned waiting = 0;   // at the block's barrier
  unsigned returned = 0;  // threads
  // Barriers that the block has passed: of any kind, of its cluster or the grid, of the grid.
  uint32_t block_barriers = 0;
  uint32_t cluster_barriers = 0;
  uint32_t grid_barriers = 0;
  SharedVariable dynamic_shared = {};
  std::map<const void*, SharedVariable> static_shared;
};

extern Thread* current;

}  // namespace simt

#endif  // TFOPS_SIMT_BLOCK_H_
