// The problem and the arrays of one virtual batch, from those of all. Host code.

#ifndef TFOPS_BATCH_NORM_VIRTUAL_BATCHES_H_
#define TFOPS_BATCH_NORM_VIRTUAL_BATCHES_H_

#include <cstdint>

#include "csrc/batch_norm/batch_norm.h"

namespace tfops {

// The problem of a virtual batch by itself. Its share in what all average is smaller than that of a batch.
inline Problem OfVirtualBatch(Problem problem) {
  if (problem.virtual_batches > 1) {
    problem.outer /= problem.virtual_batches;
    problem.exponential_avg_factor /= static_cast<double>(problem.virtual_batches);
  }
  problem.virtual_batches = 1;
  return problem;
}

inline int64_t ParamBytes(DataType dtype) { return dtype == DataType::kFloat64 ? 8 : 4; }

// Moves pointers on, but for those that are null.
template <typename... Pointers>
void MoveOn(int64_t bytes, Pointers*... pointers) {
  const auto move = [bytes](auto* pointer) {
    const auto address = reinterpret_cast<uintptr_t>(*pointer);
    if (address != 0) *pointer = reinterpret_cast<decltype(+*pointer)>(address + static_cast<uintptr_t>(bytes));
  };
  (move(pointers), ...);
}

// The arrays of the k-th virtual batch, each of which is `problem`. What all virtual batches have in common stays.

inline ForwardArrays OfVirtualBatch(const Problem& problem, ForwardArrays arrays, int64_t k) {
  MoveOn(k * problem.Elements() * ElementBytes(problem.dtype), &arrays.x, &arrays.residual, &arrays.y);
  MoveOn(k * problem.channels * ParamBytes(problem.dtype), &arrays.saved_mean, &arrays.saved_inv_std);
  MoveOn(k * LayoutOfActivationBits(problem).Bytes(), &arrays.activation_bits);
  return arrays;
}

inline BackwardArrays OfVirtualBatch(const Problem& problem, BackwardArrays arrays, int64_t k) {
  MoveOn(k * problem.Elements() * ElementBytes(problem.dtype), &arrays.dy, &arrays.x, &arrays.residual, &arrays.dx,
         &arrays.dresidual);
  MoveOn(k * problem.channels * ParamBytes(problem.dtype), &arrays.mean, &arrays.inv_std);
  MoveOn(k * LayoutOfActivationBits(problem).Bytes(), &arrays.activation_bits);
  return arrays;
}

}  // namespace tfops

#endif  // TFOPS_BATCH_NORM_VIRTUAL_BATCHES_H_
