// From run-time values to template arguments: each function calls `body` with a value whose type says which.

#ifndef TFOPS_BATCH_NORM_CUDA_DISPATCH_H_
#define TFOPS_BATCH_NORM_CUDA_DISPATCH_H_

#include <type_traits>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/types.cuh"
#include "csrc/batch_norm/portable.h"

namespace tfops::cuda {

template <typename T>
struct TypeTag {
  using Type = T;
};

template <typename Body>
auto WithDataType(DataType dtype, Body body) {
  switch (dtype) {
    case DataType::kFloat16:
      return body(TypeTag<__half>());
    case DataType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>());
    case DataType::kFloat32:
      return body(TypeTag<float>());
    case DataType::kFloat64:
      break;
  }
  return body(TypeTag<double>());
}

// The lanes of T's 16-byte vector, or 1.
template <typename T, typename Body>
auto WithLanes(bool vectorize, Body body) {
  if (vectorize) return body(std::integral_constant<int, kVectorLanes<T>>());
  return body(std::integral_constant<int, 1>());
}

// Calls body with the activation as a constant, in device code: these kernels wait for memory, so a branch that all
// threads take alike, once a vector, costs them less than a kernel for each activation would cost every build.
template <typename Body>
TFOPS_INLINE void WithActivation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kNone:
      return body(std::integral_constant<Activation, Activation::kNone>());
    case Activation::kRelu:
      return body(std::integral_constant<Activation, Activation::kRelu>());
    case Activation::kRelu6:
      return body(std::integral_constant<Activation, Activation::kRelu6>());
    case Activation::kLeakyRelu:
      return body(std::integral_constant<Activation, Activation::kLeakyRelu>());
    case Activation::kSilu:
      return body(std::integral_constant<Activation, Activation::kSilu>());
  }
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_DISPATCH_H_
