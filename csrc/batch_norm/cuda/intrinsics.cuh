// Whatever is not plain CUDA C++: memory accesses with a cache hint, clusters, the grid's barrier, shared memory. Each
// has a plain twin for csrc/simt, which runs these kernels on the CPU.
//
// Tensors are read and written through LoadGlobal and its like, and nothing else: there csrc/simt counts the bytes.

#ifndef TFOPS_BATCH_NORM_CUDA_INTRINSICS_CUH_
#define TFOPS_BATCH_NORM_CUDA_INTRINSICS_CUH_

#include <cuda_runtime.h>

#include <type_traits>

#ifdef TFOPS_SIMT
#include "csrc/simt/machine.h"
#else
#include <cooperative_groups.h>
#endif

namespace tfops::cuda {

#ifndef TFOPS_SIMT

// Loads coherently, unlike __ldg: an output may be the same array as an input.
template <typename Word>
__device__ __forceinline__ Word LoadGlobal(const Word* address) {
  return *address;
}

// Loads data that this operation does not need again: the cache may drop it first, and keeps more of the rest.
template <typename Word>
__device__ __forceinline__ Word LoadGlobalStreaming(const Word* address) {
  return __ldcs(address);
}

// Copies a vector that is to stay in registers. Of two plain copies in two branches a compiler may make one, from one
// of two addresses; and what has an address is in memory.
template <typename Word>
__device__ __forceinline__ void CopyInRegisters(const Word& from, Word* to) {
  static_assert(sizeof(Word) == 16);
  asm("mov.b32 %0, %1;" : "=r"(to->x) : "r"(from.x));
  asm("mov.b32 %0, %1;" : "=r"(to->y) : "r"(from.y));
  asm("mov.b32 %0, %1;" : "=r"(to->z) : "r"(from.z));
  asm("mov.b32 %0, %1;" : "=r"(to->w) : "r"(from.w));
}

// Has L2 fetch the line of an address that will be read soon, and takes no register for it.
__device__ __forceinline__ void PrefetchToL2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

template <typename Word>
__device__ __forceinline__ void StoreGlobal(Word* address, Word value) {
  *address = value;
}

template <typename Word>
__device__ __forceinline__ void StoreGlobalStreaming(Word* address, Word value) {
  __stcs(address, value);
}

// Copies a word of 16 bytes from global to shared memory, which is there for this thread after WaitForCopies(): on 8.0
// and later without registers, or a wait, in between. Copies between two calls of CommitCopies() are a group.
template <typename Word>
__device__ __forceinline__ void CopyAsync(Word* shared, const Word* global) {
  static_assert(sizeof(Word) == 16);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  *shared = *global;
#else
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(global)
      : "memory");
#endif
}

__device__ __forceinline__ void CommitCopies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until no more than kPending groups, the last ones, are under way.
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Clusters are of compute capability 9.0 and later. Before, each block is a cluster of its own, and to ask for more is
// the caller's mistake.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define TFOPS_HAS_CLUSTERS 1
#else
#define TFOPS_HAS_CLUSTERS 0
#endif

__device__ __forceinline__ unsigned ClusterSize() {
  unsigned size = 1;
#if TFOPS_HAS_CLUSTERS
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

__device__ __forceinline__ unsigned ClusterRank() {
  unsigned rank = 0;
#if TFOPS_HAS_CLUSTERS
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// All threads of all blocks of the cluster meet, and then see what the others wrote before. A block must not end while
// another may still read its shared memory: another barrier comes first.
__device__ __forceinline__ void ClusterBarrier() {
#if TFOPS_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// The address at which the block `rank` of the cluster has what this block has at `local` in its shared memory. It is
// an ordinary pointer.
template <typename T>
__device__ __forceinline__ T* RemoteShared(T* local, unsigned rank) {
#if TFOPS_HAS_CLUSTERS
  T* remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(local), "r"(rank));
  return remote;
#else
  __trap();
  return local;
#endif
}

#undef TFOPS_HAS_CLUSTERS

// All threads of a cooperative launch meet, and then see what the others wrote before.
__device__ __forceinline__ void GridBarrier() { cooperative_groups::this_grid().sync(); }

// The block's dynamic shared memory, as large as the launch asked for; aligned to 16 bytes.
__device__ __forceinline__ char* DynamicShared() {
  extern __shared__ __align__(16) char tfops_dynamic_shared[];
  return tfops_dynamic_shared;
}

// A variable in the block's shared memory, such as BlockShared<float[32]>(), uninitialized. Kernels declare none of
// their own with __shared__, for csrc/simt has to tell those of concurrent blocks apart. There is one for each T and
// kId in a kernel: two that live at the same time need different ones.
template <typename T, int kId = 0>
__device__ __forceinline__ T& BlockShared() {
  static_assert(std::is_trivially_default_constructible_v<T>, "nothing constructs what is in shared memory");
  __shared__ T shared;
  return shared;
}

#else  // TFOPS_SIMT

template <typename Word>
__device__ __forceinline__ Word LoadGlobal(const Word* address) {
  simt::OnGlobalAccess(address, sizeof(Word), simt::Access::kLoad);
  return *address;
}

template <typename Word>
__device__ __forceinline__ Word LoadGlobalStreaming(const Word* address) {
  return LoadGlobal(address);
}

template <typename Word>
__device__ __forceinline__ void CopyInRegisters(const Word& from, Word* to) {
  *to = from;
}

// What is fetched has to be there, which AddressSanitizer sees.
__device__ __forceinline__ void PrefetchToL2(const void* address) { *static_cast<const volatile char*>(address); }

template <typename Word>
__device__ __forceinline__ void StoreGlobal(Word* address, Word value) {
  simt::OnGlobalAccess(address, sizeof(Word), simt::Access::kStore);
  *address = value;
}

template <typename Word>
__device__ __forceinline__ void StoreGlobalStreaming(Word* address, Word value) {
  StoreGlobal(address, value);
}

template <typename Word>
__device__ __forceinline__ void CopyAsync(Word* shared, const Word* global) {
  static_assert(sizeof(Word) == 16);
  simt::OnGlobalAccess(global, sizeof(Word), simt::Access::kLoad);
  if (reinterpret_cast<uintptr_t>(shared) % sizeof(Word) != 0) simt::OnMisaligned(shared, sizeof(Word));
  simt::BeginCopy(shared, global);
}

__device__ __forceinline__ void CommitCopies() { simt::CommitCopies(); }

template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  void* to;
  const void* from;
  while (simt::NextCopy(kPending, &to, &from)) *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
}

__device__ __forceinline__ unsigned ClusterSize() { return simt::ClusterSize(); }
__device__ __forceinline__ unsigned ClusterRank() { return simt::ClusterRank(); }
__device__ __forceinline__ void ClusterBarrier(simt::Position position = simt::Position::Here()) {
  simt::ClusterBarrier(position);
}

template <typename T>
__device__ __forceinline__ T* RemoteShared(T* local, unsigned rank) {
  return static_cast<T*>(simt::RemoteShared(local, rank));
}

__device__ __forceinline__ void GridBarrier(simt::Position position = simt::Position::Here()) {
  simt::GridBarrier(position);
}

__device__ __forceinline__ char* DynamicShared() { return simt::DynamicShared(); }

template <typename T, int kId = 0>
__device__ __forceinline__ T& BlockShared() {
  static_assert(std::is_trivially_default_constructible_v<T>, "nothing constructs what is in shared memory");
  static const char key = 0;
  return *static_cast<T*>(simt::StaticShared(&key, sizeof(T), alignof(T)));
}

#endif  // TFOPS_SIMT

// What the lane has whose number differs from this one's by those bits. All lanes of the warp take part.
__device__ __forceinline__ double FromLane(double value, int bits) { return __shfl_xor_sync(0xffffffffu, value, bits); }

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_INTRINSICS_CUH_
