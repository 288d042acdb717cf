// Registering kernels with TensorFlow when the library is loaded, if they can run.

#ifndef TFOPS_TENSORFLOW_REGISTRATION_H_
#define TFOPS_TENSORFLOW_REGISTRATION_H_

#include <cstdlib>
#include <cstring>

#include "csrc/batch_norm/batch_norm.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/logging.h"

namespace tfops {

// Registers an op's kernel for a data type, and for any U: the kernels say what is wrong with it, which TensorFlow
// would not, if it found no kernel.
template <typename Op>
void RegisterKernel(const char* op, const char* device, tensorflow::DataType type) {
  const tensorflow::KernelDef* kernel =
      tensorflow::register_kernel::Name(op).Device(device).TypeConstraint("T", type).Build();
  const auto create = [](tensorflow::OpKernelConstruction* context) -> tensorflow::OpKernel* {
    return new Op(context);
  };
  tensorflow::kernel_factory::OpKernelRegistrar(kernel, op, create);
}

// Whether the driver is too old for the CUDA kernels. If TensorFlow does not know of these, it runs the ops of saved
// graphs on the CPU, and does not fail. More cannot be asked here: CUDA must not be initialized before a process forks.
inline bool IsDriverTooOld() {
  int version = 0;
  const Status status = cuda::CheckDriver(&version);
  if (status.ok() || version == 0) return false;  // without a driver TensorFlow has no GPU either
  const char* strict = std::getenv("TFOPS_STRICT");
  if (strict != nullptr && std::strcmp(strict, "1") == 0) return false;
  LOG(WARNING) << status.message << ". Until then, graphs that hold ops of tfops run these on the CPU.";
  return true;
}

}  // namespace tfops

#endif  // TFOPS_TENSORFLOW_REGISTRATION_H_
