// Jobs from problems: what of it is streamed, fetched ahead, and gone through by tiles, and which workspace it takes.

#ifndef TFOPS_BATCH_NORM_CPU_JOBS_H_
#define TFOPS_BATCH_NORM_CPU_JOBS_H_

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cpu/kernels.h"

namespace tfops::cpu {

// Hands out a workspace piece by piece; without memory, it adds up what is needed.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* Take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlignment = 64;
  char* base_;
  size_t used_ = 0;
};

ForwardJob MakeForwardJob(const Problem& problem, const ForwardArrays& arrays, Arena* arena);
BackwardJob MakeBackwardJob(const Problem& problem, const BackwardArrays& arrays, Arena* arena);
// The job of the moments by themselves.
ForwardJob MakeMomentsJob(const Problem& problem, const MomentsArrays& arrays, Arena* arena);

// What a job is to do to its k-th virtual batch.
ForwardJob OfVirtualBatch(const ForwardJob& job, int64_t k);
BackwardJob OfVirtualBatch(const BackwardJob& job, int64_t k);

}  // namespace tfops::cpu

#endif  // TFOPS_BATCH_NORM_CPU_JOBS_H_
