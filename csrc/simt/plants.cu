// The planted faults. nvcc compiles this file too, so that the kernels are what they seem.

#include "csrc/batch_norm/cuda/intrinsics.cuh"
#include "csrc/batch_norm/cuda/launch.h"
#include "csrc/simt/plants.h"

namespace tfops::cuda {

// Each of these reverses a block's, a warp's, a cluster's or the grid's elements.

__global__ void ReverseBlock(bool no_barrier, const float* input, float* output) {
  auto& values = BlockShared<float[kPlantThreads]>();
  const int first = blockIdx.x * kPlantThreads;
  values[threadIdx.x] = LoadGlobal(input + first + threadIdx.x);
  if (!no_barrier) __syncthreads();
  StoreGlobal(output + first + threadIdx.x, values[kPlantThreads - 1 - threadIdx.x]);
}

// The second use of the array must wait until the first one's readers are done.
__global__ void ReverseTwice(bool no_barrier, const float* input, float* output) {
  auto& values = BlockShared<float[kPlantThreads]>();
  const int first = blockIdx.x * kPlantThreads;
  values[threadIdx.x] = LoadGlobal(input + first + threadIdx.x);
  __syncthreads();
  const float reversed = values[kPlantThreads - 1 - threadIdx.x];
  if (!no_barrier) __syncthreads();
  values[threadIdx.x] = 2 * reversed;
  __syncthreads();
  StoreGlobal(output + first + threadIdx.x, values[kPlantThreads - 1 - threadIdx.x] / 2);
}

__global__ void DivergentBarrier(bool divergent, const float* input, float* output) {
  auto& values = BlockShared<float[kPlantThreads]>();
  const int first = blockIdx.x * kPlantThreads;
  values[threadIdx.x] = LoadGlobal(input + first + threadIdx.x);
  if (divergent && threadIdx.x >= 96) return;
  __syncthreads();
  StoreGlobal(output + first + threadIdx.x, values[kPlantThreads - 1 - threadIdx.x]);
}

__global__ void TwoBarriers(bool divergent, const float* input, float* output) {
  auto& values = BlockShared<float[kPlantThreads]>();
  const int first = blockIdx.x * kPlantThreads;
  values[threadIdx.x] = LoadGlobal(input + first + threadIdx.x);
  if (divergent && threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  StoreGlobal(output + first + threadIdx.x, values[kPlantThreads - 1 - threadIdx.x]);
}

__global__ void ReverseWarp(bool lane_missing, const float* input, float* output) {
  const int i = blockIdx.x * kPlantThreads + threadIdx.x;
  const float value = LoadGlobal(input + i);
  if (lane_missing && threadIdx.x == 37) return;
  StoreGlobal(output + i, __shfl_xor_sync(0xffffffffu, value, 31));
}

__global__ void ReverseHalfWarps(bool mask_too_small, const float* input, float* output) {
  const int i = blockIdx.x * kPlantThreads + threadIdx.x;
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const float value = LoadGlobal(input + i);
  StoreGlobal(output + i, __shfl_xor_sync(half, value, mask_too_small ? 31 : 15));
}

__global__ void SharedOverrun(bool overrun, const float* input, float* output) {
  float* const values = BlockShared<float[kPlantThreads]>();  // an array's index UndefinedBehaviorSanitizer would check
  const int first = blockIdx.x * kPlantThreads;
  values[threadIdx.x + (overrun ? 1 : 0)] = LoadGlobal(input + first + threadIdx.x);
  __syncthreads();
  StoreGlobal(output + first + threadIdx.x, values[kPlantThreads - 1 - threadIdx.x]);
}

__global__ void DynamicOverrun(bool overrun, const float* input, float* output) {
  float* const values = reinterpret_cast<float*>(DynamicShared());
  const int first = blockIdx.x * kPlantThreads;
  values[threadIdx.x + (overrun ? 1 : 0)] = LoadGlobal(input + first + threadIdx.x);
  __syncthreads();
  StoreGlobal(output + first + threadIdx.x, values[kPlantThreads - 1 - threadIdx.x]);
}

__global__ void GlobalOverrun(bool overrun, const float* input, float* output) {
  const int i = blockIdx.x * kPlantThreads + threadIdx.x;
  const int last = kPlantFloats - 1;
  StoreGlobal(output + i + (overrun ? 1 : 0), LoadGlobal(input + last - i));
}

// A kernel must not rely on order among warps without `volatile` or atomics; with too few blocks arriving it waits
// forever.
__device__ __forceinline__ void ReverseInScratch(bool no_barrier, const float* input, float* output, float* scratch) {
  const int i = blockIdx.x * kPlantThreads + threadIdx.x;
  StoreGlobal(scratch + i, LoadGlobal(input + i));
  if (!no_barrier) GridBarrier();
  StoreGlobal(output + i, LoadGlobal(scratch + kPlantFloats - 1 - i));
}

__global__ void ReverseGrid(bool no_barrier, const float* input, float* output, float* scratch) {
  ReverseInScratch(no_barrier, input, output, scratch);
}

__global__ void GridDeadlock(bool early_return, const float* input, float* output, float* scratch) {
  if (early_return && blockIdx.x == 2) return;
  ReverseInScratch(false, input, output, scratch);
}

// A block must not end before the other has read its shared memory.
__global__ void ReverseCluster(bool no_last_barrier, const float* input, float* output) {
  auto& values = BlockShared<float[kPlantThreads]>();
  const int first = blockIdx.x * kPlantThreads;
  values[threadIdx.x] = LoadGlobal(input + first + threadIdx.x);
  ClusterBarrier();
  const unsigned other = ClusterSize() - 1 - ClusterRank();
  const float value = RemoteShared(&values[0], other)[kPlantThreads - 1 - threadIdx.x];
  if (!no_last_barrier) ClusterBarrier();
  StoreGlobal(output + first + threadIdx.x, value);
}

__global__ void ClusterRace(bool no_barrier, const float* input, float* output) {
  float* const values = reinterpret_cast<float*>(DynamicShared());
  const int first = blockIdx.x * kPlantThreads;
  values[threadIdx.x] = LoadGlobal(input + first + threadIdx.x);
  if (!no_barrier) ClusterBarrier();
  const unsigned other = ClusterSize() - 1 - ClusterRank();
  const float value = RemoteShared(values, other)[kPlantThreads - 1 - threadIdx.x];
  ClusterBarrier();
  StoreGlobal(output + first + threadIdx.x, value);
}

// The last block to arrive reverses what all have left in scratch, whose first word counts the arrivals.
__global__ void LastBlock(bool not_atomic, const float* input, float* output, float* scratch) {
  auto& is_last = BlockShared<bool>();
  unsigned* const arrived = reinterpret_cast<unsigned*>(scratch);
  float* const left = scratch + 1;
  StoreGlobal(left + blockIdx.x * kPlantThreads + threadIdx.x,
              LoadGlobal(input + blockIdx.x * kPlantThreads + threadIdx.x));
  __threadfence();
  if (not_atomic) {
    const unsigned before = *arrived;
    __syncthreads();
    *arrived = before + 1;  // of all threads that have read the same number
  } else {
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(arrived, 1u);
  }
  if (threadIdx.x == 0) is_last = *arrived == kPlantBlocks;
  __syncthreads();
  if (!is_last) return;
  for (int i = threadIdx.x; i < kPlantFloats; i += kPlantThreads) {
    StoreGlobal(output + i, LoadGlobal(left + kPlantFloats - 1 - i));
  }
}

__global__ void Misaligned(bool misaligned, const float* input, float* output) {
  const int i = blockIdx.x * kPlantThreads + threadIdx.x;
  if (i % 2) return;
  const float2 pair = LoadGlobal(reinterpret_cast<const float2*>(input + (misaligned && i == 64 ? i + 1 : i)));
  StoreGlobal(output + kPlantFloats - 1 - i, pair.x);
  StoreGlobal(output + kPlantFloats - 2 - i, pair.y);
}

// --- Launchers ---------------------------------------------------------------------------------------------------

Status RunPlant(const std::string& name, bool planted, const float* input, float* output) {
  constexpr int kBytes = kPlantThreads * sizeof(float);
  const LaunchShape plain{{kPlantBlocks}, {kPlantThreads}};
  const LaunchShape dynamic{{kPlantBlocks}, {kPlantThreads}, 1, kBytes};
  const LaunchShape cluster{{kPlantBlocks}, {kPlantThreads}, kPlantBlocks, kBytes};
  const LaunchShape grid{{kPlantBlocks}, {kPlantThreads}, 1, 0, true};
  float scratch[1 + kPlantFloats] = {};  // host memory is the device's too: these run on the CPU only
  const auto with_arrays = [&](auto kernel, const LaunchShape& shape) {
    return Launch(kernel, shape, nullptr, planted, input, output);
  };
  const auto with_scratch = [&](auto kernel, const LaunchShape& shape) {
    return Launch(kernel, shape, nullptr, planted, input, output, &scratch[0]);
  };
  if (name == "ReverseBlock") return with_arrays(ReverseBlock, plain);
  if (name == "ReverseTwice") return with_arrays(ReverseTwice, plain);
  if (name == "DivergentBarrier") return with_arrays(DivergentBarrier, plain);
  if (name == "TwoBarriers") return with_arrays(TwoBarriers, plain);
  if (name == "ReverseWarp") return with_arrays(ReverseWarp, plain);
  if (name == "ReverseHalfWarps") return with_arrays(ReverseHalfWarps, plain);
  if (name == "SharedOverrun") return with_arrays(SharedOverrun, plain);
  if (name == "DynamicOverrun") return with_arrays(DynamicOverrun, dynamic);
  if (name == "GlobalOverrun") return with_arrays(GlobalOverrun, plain);
  if (name == "ReverseGrid") return with_scratch(ReverseGrid, grid);
  if (name == "GridDeadlock") return with_scratch(GridDeadlock, grid);
  if (name == "ReverseCluster") return with_arrays(ReverseCluster, cluster);
  if (name == "ClusterRace") return with_arrays(ClusterRace, cluster);
  if (name == "LastBlock") return with_scratch(LastBlock, plain);
  if (name == "Misaligned") return with_arrays(Misaligned, plain);
  return {StatusCode::kInvalidArgument, "no plant " + name};
}

}  // namespace tfops::cuda
