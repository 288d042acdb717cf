// The machine: whether kernels can run here, and on what.

#ifndef TFOPS_BATCH_NORM_CUDA_RUNTIME_H_
#define TFOPS_BATCH_NORM_CUDA_RUNTIME_H_

#include "csrc/batch_norm/batch_norm.h"

namespace tfops::cuda {

// The calling thread's current device; its number says which of them. Unavailable, with the remedy, where no kernel can
// run: no driver, one too old for the CUDA runtime that is linked in, or no GPU. The machine is looked at once a
// process.
Status CurrentDevice(Device* device, int* number);

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_RUNTIME_H_
