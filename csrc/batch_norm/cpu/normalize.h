// y = act((x - mean) * slope + offset + residual), and the bits of the activation.

#ifndef TFOPS_BATCH_NORM_CPU_NORMALIZE_H_
#define TFOPS_BATCH_NORM_CPU_NORMALIZE_H_

#include "csrc/batch_norm/cpu/traversal.h"
#include "csrc/batch_norm/cpu/vector_activation.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// A run's arrays, and what there is to do with them: see traversal.h. residual and bits may be null; K is Unknown, or
// says whether they are.
template <typename T, typename K>
struct NormalizeWork {
  using Element = T;
  using P = Param<T>;
  using Knows = K;
  using Bits = BitWriter;
  using Input = Vec<P>;  // z, before the activation
  static constexpr int kL = kLanes<P>;
  static constexpr int kUsedCoefficients = kCoefficientsOfZ;

  const T* x;
  const T* residual;
  T* y;
  uint8_t* bits;
  ActivationIn<P> activation;
  bool stream;
  int64_t x_ahead;
  int64_t residual_ahead;

  NormalizeWork(const ForwardJob& job, const Run& run, uint8_t* bits)
      : x(At<const T>(job.arrays.x, run)),
        residual(At<const T>(job.arrays.residual, run)),
        y(At<T>(job.arrays.y, run)),
        bits(bits),
        activation(job.problem),
        stream(job.stream_y),
        x_ahead(job.x_ahead),
        residual_ahead(job.residual_ahead) {}

  TFOPS_INLINE bool HasResidual() const { return K::kIsKnown ? K::kHasAddition : residual != nullptr; }
  TFOPS_INLINE bool HasBits() const { return K::kIsKnown ? K::kHasBits : bits != nullptr; }
  TFOPS_INLINE Bits BitsFrom(int64_t i) const { return Bits(HasBits() ? bits + i / 8 : nullptr); }
  TFOPS_INLINE void StopFetching() { x_ahead = residual_ahead = 0; }
  TFOPS_INLINE StreamedLines Lines(int64_t i, int64_t length) const {
    return !K::kIsCached && stream ? LinesToStream(y + i, length) : StreamedLines{};
  }

  // A cache line's elements are streamed at a time. Several lines', if x is all that is read and coefficients are
  // loaded: a core that goes from reading to writing and back at each line, and does little else, is slower than one
  // that takes its time.
  template <bool kStream, typename C>
  static constexpr int64_t BlockElements() {
    if (!K::kIsKnown) return Min(4 * kL, 32);
    if (!kStream) return kBlock;
    const bool is_x_alone = !K::kHasAddition && C::kAreLoaded && sizeof(T) < sizeof(double);
    return is_x_alone ? Min(8 * kL, 64) : kLineElements<T>;
  }

  template <bool kPartial, typename C>
  TFOPS_INLINE Vec<P> Read(const C& c, int64_t column, int64_t i, int64_t n) const {
    const Vec<P> z = Affine<P>(LoadLanes<kPartial>(x + i, n) - c.Get(kMean, column), c, column);
    return HasResidual() ? z + LoadLanes<kPartial>(residual + i, n) : z;
  }

  // Puts y in the place of z. Returns the bits.
  template <int kVectors>
  TFOPS_INLINE uint64_t Finish(Vec<P> (&z)[kVectors]) const {
    if constexpr (!K::kIsKnown) return ActivateVectors<P>(activation, HasBits(), z);
    uint64_t word = 0;
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (K::kHasBits) word |= uint64_t{BitsFromMask<P>(IsOn<K::kActivation>(z[v]))} << v * kL;
      z[v] = Activate<K::kActivation>(z[v], activation);
    }
    return word;
  }

  template <bool kPartial, typename C>
  TFOPS_INLINE void Write(Vec<P> input, const C&, int64_t, int64_t i, int64_t n, int64_t skip, Bits* writer) const {
    Vec<P> z[] = {input};
    const uint64_t word = Finish(z);
    StoreLanes<kPartial>(y + i, Encode<T>(z[0]), n);
    writer->PutFirst(static_cast<uint32_t>(word >> skip), n - skip);
  }

  template <bool kStream, bool kInPlace, int64_t kCount, typename C>
  TFOPS_INLINE void Block(const C& c, int64_t column, int64_t i, Bits* writer) const {
    constexpr int kVectors = static_cast<int>(kCount / kL);
    Vec<P> z[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      if (!K::kIsCached && v * kL % kLineElements<T> == 0) {
        FetchAhead(x + i + v * kL, x_ahead);
        if (HasResidual()) FetchAhead(residual + i + v * kL, residual_ahead);
      }
      z[v] = Read<false>(c, column + v * kL, i + v * kL, kL);
    }
    const uint64_t word = Finish(z);
    Stored<T> results[kVectors];
    for (int v = 0; v < kVectors; ++v) results[v] = Encode<T>(z[v]);
    StoreVectors(y + i, results, kStream && stream);
    if constexpr (!K::kIsKnown || K::kHasBits) {
      if (HasBits()) writer->template PutBlock<kInPlace, kCount>(word);
    }
  }
};

template <typename T>
struct Normalize {
  using Element = T;
  template <typename K>
  using Work = NormalizeWork<T, K>;

  // Calls body with what is known of a job.
  template <typename Body>
  static TFOPS_INLINE void WithKnown(const ForwardJob& job, bool tiles, Body body) {
    const Activation activation = job.problem.activation;
    const bool residual = job.arrays.residual, bits = job.arrays.activation_bits;
    WithCached(tiles || (!job.stream_y && job.x_ahead == 0 && job.residual_ahead == 0), [&](auto is_cached) {
      constexpr bool kCached = decltype(is_cached)::value;
      if (activation == Activation::kNone && !residual) return body(Known<Activation::kNone, false, false, kCached>());
      WithActivation(activation, [&](auto constant) {
        constexpr Activation kActivation = decltype(constant)::value;
        if constexpr (kActivation == Activation::kNone || !kHasLoops<kActivation> ||
                      (!kCached && kActivation != Activation::kRelu)) {
          body(Unknown());
        } else if (!residual) {
          body(Known<kActivation, false, false, kCached>());
        } else if (!bits) {
          body(Known<kActivation, true, false, kCached>());
        } else if constexpr (kIsPiecewiseLinear<kActivation>) {
          body(Known<kActivation, true, true, kCached>());
        }
      });
    });
  }
};

template <typename T>
void NormalizeItem(const ForwardJob& job, int64_t item) {
  TraverseItem<Normalize<T>>(job, item);
  if (job.stream_y) StreamFence();
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_NORMALIZE_H_
