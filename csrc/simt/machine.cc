// The scheduler: which fiber runs when, and who waits for whom.
//
// A fiber runs until it waits. All that are ready form a round; a round runs in an order drawn anew from the seed. So
// between two barriers any thread may come before any other, and a result that depends on their order changes from seed
// to seed. Where blocks are independent, a few of them, drawn likewise, run side by side; the blocks of a cluster do so
// always, and in a cooperative launch all blocks do.

#include "csrc/simt/machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>
#include <utility>

#include "csrc/simt/block.h"
#include "csrc/simt/report.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Thread* current;

namespace {

// The most independent blocks, or clusters, that run side by side.
constexpr unsigned kMostSideBySide = 3;
// Rounds without progress after which a launch hangs: far more than any kernel's shuffles and atomics from one barrier
// to the next.
constexpr unsigned kMostIdleRounds = 1 << 20;

class Random {
 public:
  void Seed(uint64_t seed) { state_ = seed * 0x9e3779b97f4a7c15 + 0x2545f4914f6cdd1d; }

  // A number in [0, n).
  unsigned Below(unsigned n) {  // xorshift64*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<unsigned>(((state_ * 0x2545f4914f6cdd1d >> 32) * n) >> 32);
  }

  template <typename T>
  void Shuffle(std::vector<T>* items) {
    for (size_t i = items->size(); i > 1; --i) std::swap((*items)[i - 1], (*items)[Below(static_cast<unsigned>(i))]);
  }

 private:
  uint64_t state_ = 1;
};

// A launch while it runs.
struct Running {
  const Grid* grid = nullptr;
  const std::function<void()>* thread = nullptr;
  std::vector<Block> blocks;            // that run side by side
  std::vector<Thread*> ready;           // in the next round
  std::vector<unsigned> cluster_waits;  // threads at their cluster's barrier
  unsigned grid_waits = 0;
  size_t returned = 0;
  unsigned idle_rounds = 0;  // since a thread last returned or a barrier was complete
  std::string failure;
};

Random random;
Running running;
std::vector<std::unique_ptr<Thread>> threads;  // kept for their stacks
std::map<const void*, size_t> static_shared_bytes;

void MainOfThread() {
  (*running.thread)();
  current->state = State::kReturned;
  current->fiber.Suspend(/*last=*/true);
}

void Wait(State state, const char* operation, Position position) {
  current->state = state;
  current->operation = operation;
  current->position = position;
  current->fiber.Suspend();
}

void Wake(Thread* thread) {
  thread->state = State::kReady;
  running.ready.push_back(thread);
}

// Releases those of `blocks` that `holds` selects from the barrier at which they all are now.
template <typename Holds>
void Release(State state, const Holds& holds) {
  for (const Block& block : running.blocks) {
    if (!holds(block)) continue;
    for (const Thread* thread : block.threads) {
      if (thread->position == current->position) continue;
      running.failure = "threads meet at different barriers\n" + DescribeThreads(running.blocks);
      return;
    }
  }
  for (Block& block : running.blocks) {
    if (!holds(block)) continue;
    for (Thread* thread : block.threads) Wake(thread);
    ++block.block_barriers;
    block.cluster_barriers += state != State::kWaitsForBlock;
    block.grid_barriers += state == State::kWaitsForGrid;
  }
  running.idle_rounds = 0;
}

// A block's shared memory ends with the block, while others of its cluster may still think that they can read it.
void EndShared(Block* block) {
  if (running.grid->cluster == 1) return;
  const auto end = [](SharedVariable& variable) {
    const std::string race = EndOfMemory(variable.memory.get(), variable.bytes);
    if (!race.empty()) running.failure = race;
    std::memset(variable.memory.get(), 0xff, variable.bytes);
#ifdef __SANITIZE_ADDRESS__
    variable.memory.reset();
#endif
  };
  end(block->dynamic_shared);
  for (auto& [key, variable] : block->static_shared) end(variable);
}

// Called when `current` has begun to wait, or has returned: releases those who waited for it alone.
void ReleaseWhoeverIsComplete() {
  Block* const block = current->block;
  switch (current->state) {
    case State::kReady:
      running.ready.push_back(current);
      return;
    case State::kWaitsForWarp: {
      const unsigned warp = current->linear / kWarp;
      const unsigned first = warp * kWarp;
      const unsigned lanes = std::min<unsigned>(kWarp, block->threads.size() - first);
      for (unsigned lane = 0; lane < lanes; ++lane) {
        const Thread& other = *block->threads[first + lane];
        if (!(current->mask >> lane & 1)) continue;
        if (other.state != State::kWaitsForWarp || other.mask != current->mask ||
            !(other.position == current->position)) {
          return;
        }
      }
      if (race_detection) block->warps[warp].lanes.Meet(current->mask);
      for (unsigned lane = 0; lane < lanes; ++lane) {
        if (!(current->mask >> lane & 1)) continue;
        block->warps[warp].exchanged[lane] = block->threads[first + lane]->deposit;
        Wake(block->threads[first + lane]);
      }
      return;
    }
    case State::kWaitsForBlock:
      if (++block->waiting < block->threads.size()) return;
      block->waiting = 0;
      return Release(State::kWaitsForBlock, [&](const Block& b) { return &b == block; });
    case State::kWaitsForCluster: {
      unsigned& waits = running.cluster_waits[block->cluster];
      if (++waits < running.grid->cluster * block->threads.size()) return;
      waits = 0;
      return Release(State::kWaitsForCluster, [&](const Block& b) { return b.cluster == block->cluster; });
    }
    case State::kWaitsForGrid:
      if (++running.grid_waits < running.blocks.size() * block->threads.size()) return;
      running.grid_waits = 0;
      return Release(State::kWaitsForGrid, [](const Block&) { return true; });
    case State::kReturned:
      ++running.returned;
      running.idle_rounds = 0;
      if (++block->returned == block->threads.size()) EndShared(block);
      if (current->fiber.Overflowed())
        running.failure = "a thread needs more than " + std::to_string(Fiber::kStackBytes) + " bytes of stack";
      return;
  }
}

// Runs the blocks in running.blocks to their end, or until something fails.
void RunSideBySide() {
  running.ready.clear();
  running.returned = 0;
  running.idle_rounds = 0;
  size_t used = 0;
  for (Block& block : running.blocks) {
    const unsigned count = blockDim.x * blockDim.y * blockDim.z;
    block.warps.resize((count + kWarp - 1) / kWarp);
    block.dynamic_shared = NewShared(running.grid->dynamic_shared, 16);
    for (unsigned linear = 0; linear < count; ++linear) {
      if (used == threads.size()) threads.push_back(std::make_unique<Thread>());
      Thread* const thread = threads[used++].get();
      thread->block = &block;
      thread->linear = linear;
      thread->index = {linear % blockDim.x, linear / blockDim.x % blockDim.y, linear / blockDim.x / blockDim.y};
      thread->copies.assign(1, {});
      thread->fiber.Start(&MainOfThread);
      block.threads.push_back(thread);
      Wake(thread);
    }
  }
  std::vector<Thread*> round;
  while (!running.ready.empty()) {
    round.swap(running.ready);
    running.ready.clear();
    if (++running.idle_rounds > kMostIdleRounds) {
      running.failure = "threads run on and on, and come to no barrier\n" + DescribeThreads(running.blocks);
      return;
    }
    random.Shuffle(&round);
    for (Thread* thread : round) {
      current = thread;
      threadIdx = thread->index;
      blockIdx = thread->block->index;
      in_fiber = true;
      thread->fiber.Resume();
      in_fiber = false;
      if (running.failure.empty()) ReleaseWhoeverIsComplete();
      if (!running.failure.empty()) return;
    }
  }
  if (running.returned < used) {
    running.failure = "deadlock: threads wait for others that will not come\n" + DescribeThreads(running.blocks);
  }
}

}  // namespace

void SetSeed(uint64_t seed) { random.Seed(seed); }

void Fail(const std::string& message) {
  in_fiber = false;  // from here on it is as good as the scheduler
  running.failure = message + "\n  " + DescribeThread(*current);
  current->fiber.Suspend(/*last=*/true);
  __builtin_unreachable();
}

void BlockBarrier(Position position) { Wait(State::kWaitsForBlock, "__syncthreads", position); }

void ClusterBarrier(Position position) {
  if (running.grid->cluster == 1) Fail("ClusterBarrier() in a launch without clusters");
  Wait(State::kWaitsForCluster, "ClusterBarrier", position);
}

void GridBarrier(Position position) {
  if (!running.grid->cooperative) Fail("GridBarrier() in a launch that is not cooperative");
  Wait(State::kWaitsForGrid, "GridBarrier", position);
}

void MayYield() {
  if (random.Below(4) != 0) return;
  current->state = State::kReady;
  current->fiber.Suspend();
}

void BeginCopy(void* to, const void* from) { current->copies.back().emplace_back(to, from); }

void CommitCopies() { current->copies.emplace_back(); }

bool NextCopy(size_t pending, void** to, const void** from) {
  auto& groups = current->copies;
  while (groups.size() > pending + 1) {
    if (groups.front().empty()) {
      groups.pop_front();
      continue;
    }
    std::tie(*to, *from) = groups.front().front();
    groups.front().pop_front();
    return true;
  }
  return false;
}

unsigned ClusterSize() { return running.grid->cluster; }
unsigned ClusterRank() { return current->block->rank; }
unsigned Lane() { return current->linear % kWarp; }

Deposits Exchange(const char* operation, unsigned mask, uint64_t value, Position position) {
  if (!(mask >> Lane() & 1)) Fail(std::string(operation) + " by a lane that its own mask lacks");
  current->mask = mask;
  current->deposit = value;
  Wait(State::kWaitsForWarp, operation, position);
  return {mask, current->block->warps[current->linear / kWarp].exchanged};
}

char* DynamicShared() { return current->block->dynamic_shared.memory.get(); }

void* StaticShared(const void* key, size_t bytes, size_t alignment) {
  SharedVariable& variable = current->block->static_shared[key];
  if (!variable.memory) variable = NewShared(bytes, alignment);
  return variable.memory.get();
}

void* RemoteShared(const void* local, unsigned rank) {
  Block& here = *current->block;
  if (rank >= running.grid->cluster) Fail("RemoteShared() of block " + std::to_string(rank) + " of the cluster");
  // Blocks of a cluster lie beside each other.
  Block& there = *(&here - here.rank + rank);
  if (there.returned == there.threads.size()) Fail("RemoteShared() of a block that has ended");
  const auto offset = [&](const SharedVariable& variable) {
    return static_cast<size_t>(static_cast<const char*>(local) - variable.memory.get());
  };
  if (offset(here.dynamic_shared) < here.dynamic_shared.bytes) {
    return there.dynamic_shared.memory.get() + offset(here.dynamic_shared);
  }
  for (const auto& [key, variable] : here.static_shared) {
    if (offset(variable) >= variable.bytes) continue;
    SharedVariable& remote = there.static_shared[key];
    if (!remote.memory) remote = NewShared(variable.bytes, 16);
    return remote.memory.get() + offset(variable);
  }
  Fail("RemoteShared() of what is not in shared memory");
}

size_t StaticSharedBytes(const void* kernel) {
  const auto found = static_shared_bytes.find(kernel);
  return found == static_shared_bytes.end() ? 0 : found->second;
}

std::string Run(const Grid& grid, const std::function<void()>& thread) {
  running = {};
  running.grid = &grid;
  ForgetAccesses();
  running.thread = &thread;
  gridDim = grid.grid;
  blockDim = grid.block;

  // The grid is counted in clusters, whose blocks are neighbours along x.
  const unsigned columns = grid.grid.x / grid.cluster;
  std::vector<unsigned> clusters(columns * grid.grid.y * grid.grid.z);
  std::iota(clusters.begin(), clusters.end(), 0u);
  random.Shuffle(&clusters);
  for (size_t next = 0; next < clusters.size();) {
    const size_t most = grid.cooperative ? clusters.size() : 1 + random.Below(kMostSideBySide);
    const size_t count = std::min(most, clusters.size() - next);
    running.blocks.clear();
    running.blocks.resize(count * grid.cluster);
    running.cluster_waits.assign(count, 0);
    running.grid_waits = 0;
    for (size_t i = 0; i < running.blocks.size(); ++i) {
      const unsigned cluster = clusters[next + i / grid.cluster];
      Block& block = running.blocks[i];
      block.rank = i % grid.cluster;
      block.cluster = static_cast<unsigned>(i / grid.cluster);
      block.index = {cluster % columns * grid.cluster + block.rank, cluster / columns % grid.grid.y,
                     cluster / columns / grid.grid.y};
    }
    RunSideBySide();
    for (const Block& block : running.blocks) {
      size_t bytes = 0;
      ForgetAccesses(block.dynamic_shared.memory.get(), block.dynamic_shared.bytes);
      for (const auto& [key, variable] : block.static_shared) {
        ForgetAccesses(variable.memory.get(), variable.bytes);
        bytes += variable.bytes;
      }
      size_t& most_bytes = static_shared_bytes[grid.kernel];
      most_bytes = std::max(most_bytes, bytes);
    }
    next += count;
    if (!running.failure.empty()) break;
  }
  running.blocks.clear();
  return running.failure;
}

}  // namespace simt
