// The instruction set whose kernels run, and what else depends on the processor.

#ifndef TFOPS_BATCH_NORM_CPU_INSTRUCTION_SET_H_
#define TFOPS_BATCH_NORM_CPU_INSTRUCTION_SET_H_

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cpu/kernels.h"

namespace tfops::cpu {

struct InstructionSetChoice {
  Status status;  // why there is none, or what is wrong with the environment's
  const char* name = "none";
  const Kernels& (*kernels_of[4])() = {};  // by DataType
  // Whether a core that reads and writes a dozen streams, each of them straight ahead, keeps up what it does in two or
  // three. Intel's do better then (a Xeon with AVX-512); AMD's take up to 2.7 times as long (Zen 5).
  bool many_streams = false;

  const Kernels& KernelsFor(DataType dtype) const { return kernels_of[static_cast<int>(dtype)](); }
};

// The best that this build and this machine have, or what the environment says. Made once.
const InstructionSetChoice& ChosenInstructionSet();

}  // namespace tfops::cpu

#endif  // TFOPS_BATCH_NORM_CPU_INSTRUCTION_SET_H_
