// What the process remembers: the settings of the policy, what was chosen for each problem, and what became of it. Host
// code without CUDA. All of it may be called from any thread.

#ifndef TFOPS_BATCH_NORM_CUDA_PREPARE_H_
#define TFOPS_BATCH_NORM_CUDA_PREPARE_H_

#include <memory>
#include <string>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/policy.h"
#include "csrc/batch_norm/cuda/streaming.h"

namespace tfops::cuda {

// What a call needs to know. Index 1 is for arrays that are all aligned to 16 bytes, 0 for others.
struct Prepared {
  Status status[2];  // of the choice
  Choice choice[2];
  StreamingTiling tiling[2];
  int64_t items = 0;  // partial results that a workspace has room for, whatever is aligned and whichever tier runs
};

// Prepares calls for a problem with at least one element. After the first call for a problem, what is prepared is found
// in a table, without an allocation, without a look at the environment. Not ok if the environment variables are wrong,
// or CUDA cannot be asked.
Status Prepare(const Problem& problem, Pass pass, const Device& device, std::shared_ptr<const Prepared>* prepared);

// Has the problem stream from now on, for CUDA would not start what was chosen; but not if the tier is forced. The
// refusal is counted, and the first of its kind is told of on stderr.
void RememberRefusal(const Problem& problem, Pass pass, bool aligned, const Device& device, const std::string& error);

// Whether a Rehearsal lives on this thread: kernels are loaded and not started, and calls do not count.
bool IsRehearsal();

void CountCall(Tier tier);

// Asks CUDA, once, about the occupancy of an on-chip kernel on a device with a number. It is defined with the kernels.
// Afterwards all launches that the occupancy has room for may be made.
Status AskOccupancy(const Device& device, DataType dtype, Pass pass, Occupancy* occupancy);

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_PREPARE_H_
