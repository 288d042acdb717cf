// Data types on the device: conversion to and from the type of all arithmetic, and vectors of up to 16 bytes.

#ifndef TFOPS_BATCH_NORM_CUDA_TYPES_CUH_
#define TFOPS_BATCH_NORM_CUDA_TYPES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/intrinsics.cuh"

namespace tfops::cuda {

// The type of arithmetic, parameters and statistics that goes with a data type.
template <typename T>
struct ArithmeticOf {
  using Type = float;
};
template <>
struct ArithmeticOf<double> {
  using Type = double;
};
template <typename T>
using Arithmetic = typename ArithmeticOf<T>::Type;

template <typename T>
inline constexpr DataType kDataTypeOf = std::is_same_v<T, __half>          ? DataType::kFloat16
                                        : std::is_same_v<T, __nv_bfloat16> ? DataType::kBFloat16
                                        : std::is_same_v<T, float>         ? DataType::kFloat32
                                                                           : DataType::kFloat64;

__device__ __forceinline__ float Widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float Widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float Widen(float value) { return value; }
__device__ __forceinline__ double Widen(double value) { return value; }

// Rounds to nearest, ties to even.
__device__ __forceinline__ void Narrow(float value, __half* result) { *result = __float2half_rn(value); }
__device__ __forceinline__ void Narrow(float value, __nv_bfloat16* result) { *result = __float2bfloat16_rn(value); }
__device__ __forceinline__ void Narrow(float value, float* result) { *result = value; }
__device__ __forceinline__ void Narrow(double value, double* result) { *result = value; }

// One rounding, and the same one wherever it is called: what z's equality in forward and backward rests on.
__device__ __forceinline__ float MultiplyAdd(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double MultiplyAdd(double a, double b, double c) { return fma(a, b, c); }

__device__ __forceinline__ float InverseRoot(float value) { return 1 / sqrtf(value); }
__device__ __forceinline__ double InverseRoot(double value) { return 1 / sqrt(value); }

// The neighbours that a 16-byte access holds.
template <typename T>
inline constexpr int kVectorLanes = static_cast<int>(16 / sizeof(T));

// The built-in type of that size. A struct of eight halves would be loaded in pieces.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using Type = unsigned short;
};
template <>
struct WordOf<4> {
  using Type = unsigned int;
};
template <>
struct WordOf<8> {
  using Type = unsigned long long;
};
template <>
struct WordOf<16> {
  using Type = uint4;
};

// kLanes neighbours of the data, as they lie in memory. kLanes is 1 or kVectorLanes<T>.
template <typename T, int kLanes>
struct Vector {
  using F = Arithmetic<T>;
  using Word = typename WordOf<static_cast<int>(sizeof(T) * kLanes)>::Type;

  Word word;

  __device__ __forceinline__ void Load(const void* array, int64_t offset) { word = LoadGlobal(Address(array, offset)); }

  // Loads data that this operation does not need again, neither what it reads nor what it writes: the cache may drop it
  // first, and keeps more of what the walk has yet to meet.
  __device__ __forceinline__ void LoadLast(const void* array, int64_t offset) {
    word = LoadGlobalStreaming(Address(array, offset));
  }
  __device__ __forceinline__ static void Prefetch(const void* array, int64_t offset) {
    PrefetchToL2(Address(array, offset));
  }

  // Begins to load into shared memory; see CopyAsync().
  __device__ __forceinline__ static void LoadAsync(const void* array, int64_t offset, Word* shared) {
    CopyAsync(shared, Address(array, offset));
  }
  __device__ __forceinline__ void Store(void* array, int64_t offset) const {
    StoreGlobalStreaming(const_cast<Word*>(Address(array, offset)), word);
  }
  // Stores results that the next operation can still find in the cache.
  __device__ __forceinline__ void StoreNext(void* array, int64_t offset) const {
    StoreGlobal(const_cast<Word*>(Address(array, offset)), word);
  }

  __device__ __forceinline__ void Unpack(F (&values)[kLanes]) const {
    T lanes[kLanes];
    memcpy(lanes, &word, sizeof(word));
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = Widen(lanes[lane]);
  }

  __device__ __forceinline__ void Pack(const F (&values)[kLanes]) {
    T lanes[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) Narrow(values[lane], &lanes[lane]);
    memcpy(&word, lanes, sizeof(word));
  }

 private:
  __device__ __forceinline__ static const Word* Address(const void* array, int64_t offset) {
    return reinterpret_cast<const Word*>(static_cast<const T*>(array) + offset);
  }
};

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_TYPES_CUH_
