// The coefficients of a vector of elements: Get(k, i) is the k-th of those of elements i and on.

#ifndef TFOPS_BATCH_NORM_CPU_COEFFICIENTS_H_
#define TFOPS_BATCH_NORM_CPU_COEFFICIENTS_H_

#include "csrc/batch_norm/cpu/kernels.h"
#include "csrc/batch_norm/cpu/stored.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// The coefficients of one channel, in all lanes.
template <typename P>
struct ChannelCoefficients {
  static constexpr bool kAreLoaded = false;

  Vec<P> of[kCoefficients];

  TFOPS_INLINE ChannelCoefficients(const Coefficients& c, int64_t channel) {
    for (int k = 0; k < kCoefficients; ++k) of[k] = c[k] ? Splat(static_cast<const P*>(c[k])[channel]) : Vec<P>{};
  }
  TFOPS_INLINE explicit ChannelCoefficients(Vec<P> mean) : of{mean} {}

  TFOPS_INLINE Vec<P> Get(Coefficient k, int64_t) const { return of[k]; }
};

// The coefficients of a run of columns: each lane is a column of its own.
template <typename P>
struct ColumnCoefficients {
  static constexpr bool kAreLoaded = true;

  const P* of[kCoefficients];

  TFOPS_INLINE ColumnCoefficients(const Coefficients& c, int64_t column) {
    for (int k = 0; k < kCoefficients; ++k) of[k] = c[k] ? static_cast<const P*>(c[k]) + column : nullptr;
  }

  TFOPS_INLINE Vec<P> Get(Coefficient k, int64_t i) const { return Load(of[k] + i); }
};

// The first kUsed coefficients of kVectors vectors of columns, in registers: i is a constant, once loops are unrolled.
template <typename P, int kVectors, int kUsed>
struct TileCoefficients {
  static constexpr bool kAreLoaded = false;

  Vec<P> of[kUsed][kVectors];

  TFOPS_INLINE TileCoefficients(const ColumnCoefficients<P>& c, int64_t column) {
    for (int k = 0; k < kUsed; ++k) {
      for (int v = 0; v < kVectors; ++v) of[k][v] = c.Get(static_cast<Coefficient>(k), column + v * kLanes<P>);
    }
  }

  TFOPS_INLINE Vec<P> Get(Coefficient k, int64_t i) const { return of[k][i / kLanes<P>]; }
};

// z before residual and activation, as forward and backward both must compute it.
template <typename P, typename C>
TFOPS_INLINE Vec<P> Affine(Vec<P> xc, const C& c, int64_t i) {
  return xc * c.Get(kSlope, i) + c.Get(kOffset, i);
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_COEFFICIENTS_H_
