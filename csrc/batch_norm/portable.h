// The few words in which host and device compilers differ.

#ifndef TFOPS_BATCH_NORM_PORTABLE_H_
#define TFOPS_BATCH_NORM_PORTABLE_H_

// A function that both compilers share is always inlined, on the host as well: the CPU kernels are compiled once for
// each instruction set, and a copy that the linker shared between them would run on the wrong machine.
#ifdef __CUDACC__
#define TFOPS_INLINE __host__ __device__ __forceinline__
#else
#define TFOPS_INLINE inline __attribute__((always_inline))
#endif

#endif  // TFOPS_BATCH_NORM_PORTABLE_H_
