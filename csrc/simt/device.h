// CUDA's device functions: barriers, shuffles, votes and reductions of a warp, atomics, arithmetic.

#ifndef TFOPS_SIMT_DEVICE_H_
#define TFOPS_SIMT_DEVICE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "csrc/simt/machine.h"

using std::max;
using std::min;

// --- Barriers ----------------------------------------------------------------------------------------------------

inline void __syncthreads(simt::Position position = simt::Position::Here()) { simt::BlockBarrier(position); }

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Position position = simt::Position::Here()) {
  simt::Exchange("__syncwarp", mask, 0, position);
}

// A fence has nothing to do: fibers see each other's writes in the order in which they were made. See README.md.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// --- Shuffles ----------------------------------------------------------------------------------------------------

namespace simt {

// What lane `source` has deposited. A lane outside the mask has deposited nothing, and its value is undefined.
template <typename T>
T Take(const char* operation, const Deposits& deposits, unsigned source) {
  if (!(deposits.mask >> source & 1)) {
    Fail(std::string(operation) + " from lane " + std::to_string(source) + ", which the mask lacks");
  }
  T value;
  std::memcpy(&value, &deposits.values[source], sizeof(value));
  return value;
}

template <typename T>
Deposits Deposit(const char* operation, unsigned mask, T value, Position position) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  uint64_t deposit = 0;
  std::memcpy(&deposit, &value, sizeof(value));
  return Exchange(operation, mask, deposit, position);
}

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Position position = simt::Position::Here()) {
  const simt::Deposits deposits = simt::Deposit("__shfl_sync", mask, value, position);
  const unsigned first = simt::Lane() / width * width;
  return simt::Take<T>("__shfl_sync", deposits, first + static_cast<unsigned>(source) % width);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   simt::Position position = simt::Position::Here()) {
  const simt::Deposits deposits = simt::Deposit("__shfl_down_sync", mask, value, position);
  const unsigned lane = simt::Lane();
  return simt::Take<T>("__shfl_down_sync", deposits, lane % width + delta < unsigned(width) ? lane + delta : lane);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 simt::Position position = simt::Position::Here()) {
  const simt::Deposits deposits = simt::Deposit("__shfl_up_sync", mask, value, position);
  const unsigned lane = simt::Lane();
  return simt::Take<T>("__shfl_up_sync", deposits, lane % width >= delta ? lane - delta : lane);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, simt::Position position = simt::Position::Here()) {
  const simt::Deposits deposits = simt::Deposit("__shfl_xor_sync", mask, value, position);
  const unsigned lane = simt::Lane();
  const unsigned source = lane ^ static_cast<unsigned>(lanes);
  // A lane may read from groups before its own, but not from those after.
  return simt::Take<T>("__shfl_xor_sync", deposits, source / width <= lane / width ? source : lane);
}

// --- Votes and reductions ----------------------------------------------------------------------------------------

namespace simt {

template <typename T, typename Combine>
T Reduce(const char* operation, unsigned mask, T value, Position position, Combine combine) {
  const Deposits deposits = Deposit(operation, mask, value, position);
  const unsigned me = Lane();
  T result = value;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (lane != me && (mask >> lane & 1)) result = combine(result, Take<T>(operation, deposits, lane));
  }
  return result;
}

}  // namespace simt

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Position position = simt::Position::Here()) {
  const unsigned mine = predicate ? 1u << simt::Lane() : 0u;
  return simt::Reduce("__ballot_sync", mask, mine, position, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, simt::Position position = simt::Position::Here()) {
  return simt::Reduce("__any_sync", mask, int(predicate != 0), position, [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int predicate, simt::Position position = simt::Position::Here()) {
  return simt::Reduce("__all_sync", mask, int(predicate != 0), position, [](int a, int b) { return a & b; });
}

#define TFOPS_SIMT_REDUCE(name, T, expression)                                                     \
  inline T name(unsigned mask, T value, simt::Position position = simt::Position::Here()) {        \
    return simt::Reduce(#name, mask, value, position, [](T a, T b) -> T { return (expression); }); \
  }
TFOPS_SIMT_REDUCE(__reduce_add_sync, unsigned, a + b)
TFOPS_SIMT_REDUCE(__reduce_add_sync, int, a + b)
TFOPS_SIMT_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
TFOPS_SIMT_REDUCE(__reduce_min_sync, int, a < b ? a : b)
TFOPS_SIMT_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a)
TFOPS_SIMT_REDUCE(__reduce_max_sync, int, a < b ? b : a)
TFOPS_SIMT_REDUCE(__reduce_and_sync, unsigned, a& b)
TFOPS_SIMT_REDUCE(__reduce_or_sync, unsigned, a | b)
TFOPS_SIMT_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef TFOPS_SIMT_REDUCE

// --- Atomics: fibers are not interrupted, and so everything is atomic ------------------------------------------------

namespace simt {

// An atomic is no race, whoever else comes to the same address.
template <typename T, typename Update>
__attribute__((no_sanitize("thread"))) T Atomic(T* address, Update update) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) OnMisaligned(address, sizeof(T));
  const T old = *address;
  *address = update(old);
  MayYield();  // let the others come in between this and what follows
  return old;
}

// The argument's type is not deduced: atomicAdd(unsigned*, 1) is CUDA too.
template <typename T>
struct Same {
  using Type = T;
};

}  // namespace simt

template <typename T>
T atomicAdd(T* address, typename simt::Same<T>::Type value) {
  return simt::Atomic(address, [&](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMin(T* address, typename simt::Same<T>::Type value) {
  return simt::Atomic(address, [&](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicMax(T* address, typename simt::Same<T>::Type value) {
  return simt::Atomic(address, [&](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicOr(T* address, typename simt::Same<T>::Type value) {
  return simt::Atomic(address, [&](T old) { return old | value; });
}
template <typename T>
T atomicAnd(T* address, typename simt::Same<T>::Type value) {
  return simt::Atomic(address, [&](T old) { return old & value; });
}
template <typename T>
T atomicExch(T* address, typename simt::Same<T>::Type value) {
  return simt::Atomic(address, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, typename simt::Same<T>::Type expected, typename simt::Same<T>::Type value) {
  return simt::Atomic(address, [&](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return simt::Atomic(address, [&](unsigned old) { return old >= last ? 0 : old + 1; });
}

// --- Arithmetic --------------------------------------------------------------------------------------------------

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }
inline double rsqrt(double value) { return 1 / std::sqrt(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float value) { return std::exp(value); }

#endif  // TFOPS_SIMT_DEVICE_H_
