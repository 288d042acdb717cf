// The phases of a call, shared among threads.
//
// A thread that waits in a pool takes tens of microseconds to wake, as long as a whole call on a small tensor. So
// helpers are asked for once a call, not once a phase, and are never waited for: one that comes late finds fewer items,
// or none.
//
// Each thread has a share of every phase's items, the same part of each, and takes from others' shares when its own is
// done. So it finds in its core's caches what it left there in the phase before. Between cores that have no cache in
// common, which even two may not, moving a line takes as long as fetching it from memory.

#ifndef TFOPS_BATCH_NORM_CPU_PHASES_H_
#define TFOPS_BATCH_NORM_CPU_PHASES_H_

#include <functional>
#include <vector>

#include "csrc/batch_norm/batch_norm.h"

namespace tfops::cpu {

struct Phase {
  int64_t items = 0;
  std::function<void(int64_t item)> body;
  bool backwards = false;  // a thread begins with the last of its share
};

// Calls every phase's body for all of its items, each phase after the one before it is done. Asks for no more than
// `helpers` threads' help.
void RunPhases(const Threads& threads, int64_t helpers, std::vector<Phase> phases);

}  // namespace tfops::cpu

#endif  // TFOPS_BATCH_NORM_CPU_PHASES_H_
