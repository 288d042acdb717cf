// The machine: whether kernels can run here, and on what.

#ifndef TFOPS_BATCH_NORM_CUDA_RUNTIME_H_
#define TFOPS_BATCH_NORM_CUDA_RUNTIME_H_

#include <vector>

#include "csrc/batch_norm/batch_norm.h"

namespace tfops::cuda {

// The calling thread's current device; its number says which of them. Unavailable, with the remedy, where no kernel can
// run: no driver, one too old for the CUDA runtime that is linked in, or no GPU. The machine is looked at once a
// process.
Status CurrentDevice(Device* device, int* number);

// The GPUs of this machine, by number; one H200 where there is none.
const std::vector<Device>& AllDevices();

// Calls `call(device, number)` for the GPUs that are asked for, until one is not ok.
template <typename Call>
Status ForEachDevice(Gpus gpus, const Call& call) {
  if (gpus == Gpus::kCurrent) {
    Device device;
    int number = 0;
    const Status status = CurrentDevice(&device, &number);
    return status.ok() ? call(device, number) : status;
  }
  const std::vector<Device>& devices = AllDevices();
  for (size_t number = 0; number < devices.size(); ++number) {
    if (const Status status = call(devices[number], static_cast<int>(number)); !status.ok()) return status;
  }
  return {};
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_RUNTIME_H_
