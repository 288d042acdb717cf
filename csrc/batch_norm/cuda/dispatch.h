// From run-time values to template arguments: each function calls `body` with a value whose type says which.

#ifndef TFOPS_BATCH_NORM_CUDA_DISPATCH_H_
#define TFOPS_BATCH_NORM_CUDA_DISPATCH_H_

#include <type_traits>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/types.cuh"

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

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_DISPATCH_H_
