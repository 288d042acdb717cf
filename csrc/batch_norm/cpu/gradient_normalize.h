// dx = dz * slope + (x - mean) * tilt + shift, and dresidual = dz.

#ifndef TFOPS_BATCH_NORM_CPU_GRADIENT_NORMALIZE_H_
#define TFOPS_BATCH_NORM_CPU_GRADIENT_NORMALIZE_H_

#include "csrc/batch_norm/cpu/gradient.h"
#include "csrc/batch_norm/cpu/traversal.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

struct NoBits {
  TFOPS_INLINE void Finish() const {}
};

// A run's arrays, and what there is to do with them: see traversal.h. dresidual may be null; where K is known, it is
// there if kHasAddition, and dx has the statistics' terms.
template <typename T, typename K>
struct GradientNormalizeWork : GradientInputs<T, K> {
  using Inputs = GradientInputs<T, K>;
  using P = Param<T>;
  using Bits = NoBits;
  using Inputs::kL;
  static constexpr int kUsedCoefficients = kCoefficients;

  T* dx;
  T* dresidual;
  bool has_statistics_terms;
  bool stream_dx;
  bool stream_dresidual;

  TFOPS_INLINE GradientNormalizeWork(const BackwardJob& job, const Run& run, const uint8_t* bits)
      : Inputs(job, run, bits, job.dx_ahead),
        dx(At<T>(job.arrays.dx, run)),
        dresidual(At<T>(job.arrays.dresidual, run)),
        has_statistics_terms(job.has_statistics_terms),
        stream_dx(job.stream_dx),
        stream_dresidual(job.stream_dresidual) {
    // Lines of both begin at the same elements, or dresidual is written through the cache.
    if (!K::kIsCached && stream_dx && stream_dresidual) {
      stream_dresidual = LinesToStream(dresidual, run.length) == LinesToStream(dx, run.length);
    }
  }

  TFOPS_INLINE bool HasDresidual() const { return K::kIsKnown ? K::kHasAddition : dresidual != nullptr; }
  TFOPS_INLINE Bits BitsFrom(int64_t) const { return {}; }
  TFOPS_INLINE StreamedLines Lines(int64_t i, int64_t length) const {
    if (K::kIsCached || !(stream_dx || stream_dresidual)) return {};
    return LinesToStream((stream_dx ? dx : dresidual) + i, length);
  }

  // A cache line's elements are streamed at a time.
  template <bool kStream, typename C>
  static constexpr int64_t BlockElements() {
    if (!K::kIsKnown) return Min(4 * kL, 32);
    return kStream && kLineElements<T> > 8 ? kLineElements<T> : kL > 8 ? kL : 8;
  }

  template <typename C>
  TFOPS_INLINE Vec<P> Dx(const Gradient<P>& g, const C& c, int64_t column) const {
    // Left to GCC, the second sum is fused with its product in some loops, and in others not.
    const bool has_rest = K::kIsKnown || has_statistics_terms;
    const Vec<P> rest = has_rest ? MultiplyAdd(g.xc, c.Get(kTilt, column), c.Get(kShift, column)) : Vec<P>{};
    return MultiplyAdd(g.dz, c.Get(kSlope, column), rest);
  }

  // dresidual's elements: dz, which is dy or 0 where slopes are 1 and 0.
  static TFOPS_INLINE Stored<T> EncodeDz(Vec<P> dz) {
    if constexpr (K::kIsKnown && K::kHasBits && K::kActivation != Activation::kLeakyRelu) return EncodeExact<T>(dz);
    return Encode<T>(dz);
  }

  template <bool kPartial, typename C>
  TFOPS_INLINE void Write(const Gradient<P>& input, const C& c, int64_t column, int64_t i, int64_t n, int64_t,
                          Bits*) const {
    Gradient<P> g[] = {input};
    Inputs::Finish(g);
    // dresidual first: it may be dy itself, but so may dx, and both have been read.
    if (HasDresidual()) StoreLanes<kPartial>(dresidual + i, EncodeDz(g[0].dz), n);
    StoreLanes<kPartial>(dx + i, Encode<T>(Dx(g[0], c, column)), n);
  }

  // All of dresidual, and then dx. Were they written in turns vector by vector, lines would leave for memory half full
  // as soon as what is read next lies at the same place of its page as they do. So would they if both were computed
  // first, and then written one right after the other, at the same place of two pages.
  template <bool kStream, bool kInPlace, int64_t kCount, typename C>
  TFOPS_INLINE void Block(const C& c, int64_t column, int64_t i, Bits*) const {
    constexpr int kVectors = static_cast<int>(kCount / kL);
    Gradient<P> g[kVectors];
    uint64_t word = 0;
    if constexpr (!K::kIsKnown || K::kHasBits) {
      if (Inputs::HasBits()) word = LoadBlockOfBits<kCount, kInPlace>(this->bits, i);
    }
    for (int v = 0; v < kVectors; ++v) {
      const int64_t k = v * kL;
      if (k % kLineElements<T> == 0) Inputs::Fetch(i + k);
      g[v] = Inputs::template ReadWith<false>(static_cast<uint32_t>(word >> k), c, column + k, i + k, kL);
    }
    Inputs::Finish(g);
    Stored<T> results[kVectors];
    if (HasDresidual()) {
      for (int v = 0; v < kVectors; ++v) results[v] = EncodeDz(g[v].dz);
      StoreVectors(dresidual + i, results, kStream && stream_dresidual);
    }
    for (int v = 0; v < kVectors; ++v) results[v] = Encode<T>(Dx(g[v], c, column + v * kL));
    StoreVectors(dx + i, results, kStream && stream_dx);
  }
};

template <typename T>
struct GradientNormalize {
  using Element = T;
  template <typename K>
  using Work = GradientNormalizeWork<T, K>;

  // Calls body with what is known of a job: of those alone whose dx has all terms, with dresidual where there are bits.
  template <typename Body>
  static TFOPS_INLINE void WithKnown(const BackwardJob& job, bool tiles, Body body) {
    const bool has_dresidual = job.arrays.dresidual, has_bits = job.arrays.activation_bits;
    if (!job.has_statistics_terms || has_dresidual != has_bits) return body(Unknown());
    const bool cached = tiles || (job.dx_ahead == 0 && !job.stream_dx && !job.stream_dresidual);
    WithKnownGradient</*kAddition=*/true>(job, cached, body);
  }
};

template <typename T>
void GradientNormalizeItem(const BackwardJob& job, int64_t item) {
  TraverseItem<GradientNormalize<T>>(job, item);
  if (job.stream_dx || job.stream_dresidual) StreamFence();
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_GRADIENT_NORMALIZE_H_
