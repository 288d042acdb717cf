// float16, as far as the kernels use it. The compiler's own type rounds as the GPU does: to nearest, ties to even.

#ifndef TFOPS_SIMT_INCLUDE_CUDA_FP16_H_
#define TFOPS_SIMT_INCLUDE_CUDA_FP16_H_

struct __half {
  _Float16 value;
};

inline float __half2float(__half value) { return static_cast<float>(value.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }

#endif  // TFOPS_SIMT_INCLUDE_CUDA_FP16_H_
