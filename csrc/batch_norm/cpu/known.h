// What a loop over elements knows when it is compiled.
//
// To ask at each vector which arrays there are, and which activation, takes as long as to compute it. So what training
// and inference mostly do has loops of its own: with the activations that have loops (kHasLoops) where arrays are
// cached, with none and ReLU where memory is waited for. All else is done by one loop that asks, a few vectors at a
// time.

#ifndef TFOPS_BATCH_NORM_CPU_KNOWN_H_
#define TFOPS_BATCH_NORM_CPU_KNOWN_H_

#include <type_traits>

#include "csrc/batch_norm/cpu/kernels.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// kAddition: there is a residual, or dresidual. kBits: there are activation bits. kCached: nothing is streamed, or
// fetched ahead. kInPlace: the gradient reads y.
template <Activation kActivationValue, bool kAddition, bool kBits, bool kCached, bool kKnown = true,
          bool kInPlace = false>
struct Known {
  static constexpr bool kIsKnown = kKnown;
  static constexpr Activation kActivation = kActivationValue;
  static constexpr bool kHasAddition = kAddition;
  static constexpr bool kHasBits = kBits;
  static constexpr bool kIsCached = kCached;
  static constexpr bool kIsInPlace = kInPlace;
};
using Unknown = Known<Activation::kNone, false, false, false, false>;
template <Activation kActivation>
using InPlace = Known<kActivation, false, false, /*kCached=*/false, /*kKnown=*/true, /*kInPlace=*/true>;

// x86 without AVX2, and machines that the kernels do not know, have no loops of their own for what is cached: they ask.
#if TFOPS_VECTOR_BYTES >= 32 || defined(__aarch64__)
inline constexpr bool kHasCachedLoops = true;
#else
inline constexpr bool kHasCachedLoops = false;
#endif

// Calls body with whether a job's arrays are cached, as a constant.
template <typename Body>
TFOPS_INLINE void WithCached(bool cached, Body body) {
  if (kHasCachedLoops && cached) {
    body(std::bool_constant<kHasCachedLoops>());
  } else {
    body(std::false_type());
  }
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_KNOWN_H_
