// The handlers as C symbols, which tfops_kernels/jax.py registers with JAX: Tfops_<op>_cpu; Tfops_<op>_cuda, and
// Tfops_<op>_cuda_initialize for the stage before it. Tfops_ffi_version has the version of XLA's interface that they
// were built with, major and minor.

#include "csrc/xla/handlers.h"

extern "C" TFOPS_EXPORT const int Tfops_ffi_version[2];
extern "C" const int Tfops_ffi_version[2] = {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};

#define TFOPS_EXPORT_HANDLERS(name, Op)                                                             \
  extern "C" TFOPS_EXPORT XLA_FFI_Error* Tfops_##name##_cpu(XLA_FFI_CallFrame* frame) {             \
    return tfops::CpuHandler<tfops::Op>(frame);                                                     \
  }                                                                                                 \
  extern "C" TFOPS_EXPORT XLA_FFI_Error* Tfops_##name##_cuda(XLA_FFI_CallFrame* frame) {            \
    return tfops::CudaHandler<tfops::Op>(frame);                                                    \
  }                                                                                                 \
  extern "C" TFOPS_EXPORT XLA_FFI_Error* Tfops_##name##_cuda_initialize(XLA_FFI_CallFrame* frame) { \
    return tfops::CudaPreparer<tfops::Op>(frame);                                                   \
  }

TFOPS_FOR_EACH_XLA_OP(TFOPS_EXPORT_HANDLERS)
