// Races: two threads that come to the same byte, one of them to write, with no barrier between that both take part in.
//
// The order in which fibers run shows a missing barrier only where it changes a result. This finds it wherever the two
// accesses happen at all. It needs the variant "race", in which the compiler announces each access (-fsanitize=thread,
// with race.cc in the place of that sanitizer's own library, for which fibers on one thread could never race).

#ifndef TFOPS_SIMT_RACE_H_
#define TFOPS_SIMT_RACE_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

// Whether the compiler announces accesses.
extern bool race_detection;
// Whether a fiber runs, and not the scheduler.
extern bool in_fiber;

// Called at the start of a launch: what came before is ordered.
void ForgetAccesses();
// Called when the thread that runs is the last of its block: "", or which block may still read the memory.
std::string EndOfMemory(const void* memory, size_t bytes);
// Forgets memory that is freed, and may come back for another block.
void ForgetAccesses(const void* memory, size_t bytes);

// What orders accesses: how many barriers have been passed, by each pair of lanes, the block, the cluster, the grid.
struct LaneClocks {
  uint32_t now = 1;
  uint32_t met[32][32] = {};  // when two lanes were last in one shuffle

  void Meet(unsigned mask);
};

}  // namespace simt

#endif  // TFOPS_SIMT_RACE_H_
