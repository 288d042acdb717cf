// Small kernels, each right as written and wrong when its fault is planted: what the runner must find.

#ifndef TFOPS_SIMT_PLANTS_H_
#define TFOPS_SIMT_PLANTS_H_

#include <string>

#include "csrc/batch_norm/batch_norm.h"

namespace tfops::cuda {

// Runs the kernel of that name, with its fault or without. Input and output are of kPlantFloats.
inline constexpr int kPlantThreads = 128;
inline constexpr int kPlantBlocks = 4;
inline constexpr int kPlantFloats = kPlantThreads * kPlantBlocks;
Status RunPlant(const std::string& name, bool planted, const float* input, float* output);

}  // namespace tfops::cuda

#endif  // TFOPS_SIMT_PLANTS_H_
