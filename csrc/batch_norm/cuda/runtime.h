// The GPUs of the machine.

#ifndef TFOPS_BATCH_NORM_CUDA_RUNTIME_H_
#define TFOPS_BATCH_NORM_CUDA_RUNTIME_H_

#include <vector>

#include "csrc/batch_norm/batch_norm.h"

namespace tfops::cuda {

// The GPUs of this machine, by number; one H200 where there is none.
const std::vector<Device>& AllDevices();

// Calls `call(device)` for the GPUs that are asked for, until one is not ok.
template <typename Call>
Status ForEachDevice(Gpus gpus, const Call& call) {
  if (gpus == Gpus::kCurrent) {
    Device device;
    const Status status = CurrentDevice(&device);
    return status.ok() ? call(device) : status;
  }
  for (const Device& device : AllDevices()) {
    if (const Status status = call(device); !status.ok()) return status;
  }
  return {};
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_RUNTIME_H_
