// Mergeable statistics, and what becomes of them: the arithmetic of one channel, shared by host and device.

#ifndef TFOPS_BATCH_NORM_MOMENTS_H_
#define TFOPS_BATCH_NORM_MOMENTS_H_

#include <cmath>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/portable.h"

namespace tfops {

// The count, mean and sum of squared deviations from that mean, of a set of numbers.
template <typename F>
struct Moments {
  F count;
  F mean;
  F m2;
};

// What to take for a shift: 0 in place of an infinity or a NaN, which would make NaNs of all that it is taken from,
// where the mean of numbers among which there are infinities of one sign is that infinity. Serves scalars and vectors.
template <typename F>
TFOPS_INLINE F FiniteOrZero(F shift) {
  return shift - shift == F{} ? shift : F{};
}

// The mean of two sets of numbers, from the mean of each and `step`: the difference of the means times the second set's
// share in the whole. If a mean is not finite, the step is not either, and what is returned is infinite or NaN as the
// sum of all numbers would be.
template <typename F>
TFOPS_INLINE F MergedMean(F a, F b, F step) {
  return a + (step - step == F{} ? step : b);
}

// The moments of `count` numbers x, from sum(x - shift) and sum((x - shift)^2).
//
// The rounding error of the second sum, in proportion to count * (variance + (mean - shift)^2), is left in m2. So the
// shift has to be within a few standard deviations of the mean. One of the numbers is, but for outliers, and even those
// are within sqrt(count) of them. The mean of as many earlier numbers is, too; or else Merge adds a term of the size of
// count * (mean - shift)^2 to m2, beside which that error is small.
template <typename F>
TFOPS_INLINE Moments<F> MomentsOfShifted(F count, F shift, F sum, F sum_of_squares) {
  const F mean = sum / count;
  const F m2 = sum_of_squares - sum * mean;
  return {count, shift + mean, m2 < F(0) ? F(0) : m2};
}

// Merges two sets by Chan's rule: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
// sample variances", 1979.
template <typename F>
TFOPS_INLINE Moments<F> Merge(const Moments<F>& a, const Moments<F>& b) {
  if (b.count == F(0)) return a;
  if (a.count == F(0)) return b;  // and no delta, whose square might overflow
  const F count = a.count + b.count;
  const F weight = b.count / count;
  const F delta = b.mean - a.mean;
  return {count, MergedMean(a.mean, b.mean, delta * weight), a.m2 + b.m2 + delta * delta * (a.count * weight)};
}

TFOPS_INLINE double InverseStd(double variance, double epsilon) { return 1.0 / sqrt(variance + epsilon); }

// inv_std * scale as both passes must round it.
template <typename P>
TFOPS_INLINE P Slope(P scale, double inv_std) {
  return static_cast<P>(static_cast<double>(scale) * inv_std);
}

// The statistics of a batch that the gradient needs, as they are saved. P is the param type.
template <typename P>
struct SavedStatistics {
  P mean;
  P inv_std;
};

template <typename P>
TFOPS_INLINE SavedStatistics<P> StatisticsToSave(const Problem& problem, const Moments<double>& moments) {
  const double n = moments.count;
  const double variance = n > 0 ? moments.m2 / n : 0.0;
  return {static_cast<P>(n > 0 ? moments.mean : 0.0), static_cast<P>(InverseStd(variance, problem.epsilon))};
}

// What the running statistics take in.
struct TakenIn {
  double mean;
  double variance;
};

TFOPS_INLINE TakenIn StatisticsToTakeIn(const Problem& problem, const Moments<double>& moments) {
  const double n = moments.count;
  const double variance = n > 0 ? moments.m2 / n : 0.0;
  const double bessel = problem.unbiased && n > 1 ? n / (n - 1) : 1.0;
  return {moments.mean, variance * bessel};
}

// Writes the running statistics of channel c.
template <typename P>
TFOPS_INLINE void WriteRunningStatistics(const Problem& problem, const ForwardArrays& arrays, bool is_empty,
                                         const TakenIn& taken, int64_t c) {
  const P* mean_in = static_cast<const P*>(arrays.mean);
  const P* variance_in = static_cast<const P*>(arrays.variance);
  // An empty batch has no statistics: the running ones stay as they are.
  const double factor = is_empty ? 0.0 : problem.exponential_avg_factor;
  double mean_out = factor * taken.mean;
  double variance_out = factor * taken.variance;
  if (factor < 1.0) {
    mean_out += (1.0 - factor) * (mean_in ? static_cast<double>(mean_in[c]) : 0.0);
    variance_out += (1.0 - factor) * (variance_in ? static_cast<double>(variance_in[c]) : 0.0);
  }
  static_cast<P*>(arrays.mean_out)[c] = static_cast<P>(mean_out);
  static_cast<P*>(arrays.variance_out)[c] = static_cast<P>(variance_out);
}

// Likewise, from the channel's moments.
template <typename P>
TFOPS_INLINE void WriteRunningStatistics(const Problem& problem, const ForwardArrays& arrays,
                                         const Moments<double>& moments, int64_t c) {
  WriteRunningStatistics<P>(problem, arrays, !(moments.count > 0), StatisticsToTakeIn(problem, moments), c);
}

// Likewise, from the sums of what all virtual batches have for them to take in.
template <typename P>
TFOPS_INLINE void WriteAverageStatistics(const Problem& problem, const ForwardArrays& arrays, const TakenIn& sums,
                                         int64_t c) {
  const bool is_empty = problem.Count() == 0;
  const double batches = static_cast<double>(is_empty ? 1 : problem.virtual_batches);
  WriteRunningStatistics<P>(problem, arrays, is_empty, TakenIn{sums.mean / batches, sums.variance / batches}, c);
}

// Writes the statistics of channel c that the gradient needs, from its moments.
template <typename P>
TFOPS_INLINE void WriteSavedStatistics(const Problem& problem, const ForwardArrays& arrays,
                                       const Moments<double>& moments, int64_t c) {
  const SavedStatistics<P> saved = StatisticsToSave<P>(problem, moments);
  static_cast<P*>(arrays.saved_mean)[c] = saved.mean;
  static_cast<P*>(arrays.saved_inv_std)[c] = saved.inv_std;
}

// Writes the running statistics of channel c from its moments. Of one virtual batch among several, what they take in
// goes to taken[own], where `own` is the channel's place in [V, C], and is averaged later.
template <typename P>
TFOPS_INLINE void FinishRunningStatistics(const Problem& problem, const ForwardArrays& arrays,
                                          const Moments<double>& moments, int64_t c, int64_t own, TakenIn* taken) {
  if (taken) {
    taken[own] = StatisticsToTakeIn(problem, moments);
  } else {
    WriteRunningStatistics<P>(problem, arrays, moments, c);
  }
}

// dx = dz * slope + (x - mean) * tilt + shift
template <typename P>
struct GradientCoefficients {
  P slope;
  P tilt;
  P shift;
};

// 1 / sqrt(variance + epsilon) of channel c, as the forward pass saved it in training, or of the variance as given.
template <typename P>
TFOPS_INLINE double InverseStd(const Problem& problem, const BackwardArrays& arrays, int64_t c) {
  if (problem.training) return static_cast<double>(static_cast<const P*>(arrays.inv_std)[c]);
  return InverseStd(static_cast<double>(static_cast<const P*>(arrays.variance)[c]), problem.epsilon);
}

// Writes the [C] gradients of channel c from its two sums. The formulas are in batch_norm.h.
template <typename P>
TFOPS_INLINE void WriteGradients(const Problem& problem, const BackwardArrays& arrays, double sum_dz, double sum_dz_xc,
                                 int64_t c) {
  const double inv_std = InverseStd<P>(problem, arrays, c);
  static_cast<P*>(arrays.doffset)[c] = static_cast<P>(sum_dz);
  static_cast<P*>(arrays.dscale)[c] = static_cast<P>(sum_dz_xc * inv_std);
  if (problem.training) return;
  const double slope = static_cast<double>(static_cast<const P*>(arrays.scale)[c]) * inv_std;
  static_cast<P*>(arrays.dmean_in)[c] = static_cast<P>(-slope * sum_dz);
  static_cast<P*>(arrays.dvariance_in)[c] = static_cast<P>(-0.5 * slope * inv_std * inv_std * sum_dz_xc);
}

// The coefficients of dx for channel c, from its two sums.
template <typename P>
TFOPS_INLINE GradientCoefficients<P> CoefficientsOfGradient(const Problem& problem, const BackwardArrays& arrays,
                                                            double sum_dz, double sum_dz_xc, int64_t c) {
  const double inv_std = InverseStd<P>(problem, arrays, c);
  const double slope = static_cast<double>(static_cast<const P*>(arrays.scale)[c]) * inv_std;
  const double n = static_cast<double>(problem.Count());
  if (!problem.training || n == 0) return {static_cast<P>(slope), P(0), P(0)};
  double tilt = -slope * inv_std * inv_std * sum_dz_xc / n;
  double shift = -slope * sum_dz / n;
  if (arrays.dmean) {
    shift += problem.exponential_avg_factor * static_cast<double>(static_cast<const P*>(arrays.dmean)[c]) / n;
  }
  if (arrays.dvariance) {
    const double divisor = problem.unbiased && n > 1 ? n - 1 : n;
    tilt += 2.0 * problem.exponential_avg_factor * static_cast<double>(static_cast<const P*>(arrays.dvariance)[c]) /
            divisor;
  }
  return {static_cast<P>(slope), static_cast<P>(tilt), static_cast<P>(shift)};
}

// A virtual batch's share in the gradients of offset and scale.
struct SharedGradients {
  double offset;
  double scale;
};

// Writes the [C] gradients of channel c from its two sums. Of one virtual batch among several, whose inv_std `arrays`
// has, its share in these goes to shared[own], likewise, and is added up later.
template <typename P>
TFOPS_INLINE void FinishGradient(const Problem& problem, const BackwardArrays& arrays, double sum_dz, double sum_dz_xc,
                                 int64_t c, int64_t own, SharedGradients* shared) {
  if (shared) {
    shared[own] = {sum_dz, sum_dz_xc * InverseStd<P>(problem, arrays, c)};
  } else {
    WriteGradients<P>(problem, arrays, sum_dz, sum_dz_xc, c);
  }
}

}  // namespace tfops

#endif  // TFOPS_BATCH_NORM_MOMENTS_H_
