// The extent of a grid in blocks or of a block in threads. CUDA's dim3, for host code that is compiled without CUDA.

#ifndef TFOPS_BATCH_NORM_CUDA_EXTENT_H_
#define TFOPS_BATCH_NORM_CUDA_EXTENT_H_

namespace tfops::cuda {

struct Extent {
  int x = 1;
  int y = 1;
  int z = 1;
};

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_EXTENT_H_
