// What is done channel by channel: what partial moments and sums come to, and the coefficients of every column.

#ifndef TFOPS_BATCH_NORM_CPU_CHANNELS_H_
#define TFOPS_BATCH_NORM_CPU_CHANNELS_H_

#include <cstring>

#include "csrc/batch_norm/cpu/kernels.h"
#include "csrc/batch_norm/cpu/moments.h"
#include "csrc/batch_norm/in_place.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// Loops over channels are one for each array that they write: else the compiler would not move all conditions out of
// them, and then not make vectors of them. So do they have copies of problem and arrays, which no store changes.

// Copies the coefficients of channels begin to end from their first columns to their others.
template <typename P>
TFOPS_INLINE void RepeatColumns(const Job& job, Coefficient k, int64_t begin, int64_t end) {
  P* first = static_cast<P*>(job.coefficients[k]) + begin;
  for (int64_t f = 1; f < job.partition.fold; ++f) {
    std::memcpy(first + f * job.problem.channels, first, static_cast<size_t>(end - begin) * sizeof(P));
  }
}

// Writes a coefficient of every column of channels begin to end, value(c) being channel c's.
template <typename P, typename Value>
TFOPS_INLINE void SetCoefficients(const Job& job, Coefficient k, int64_t begin, int64_t end, Value value) {
  P* first = static_cast<P*>(job.coefficients[k]);
#pragma GCC ivdep
  for (int64_t c = begin; c < end; ++c) first[c] = value(c);
  RepeatColumns<P>(job, k, begin, end);
}

// Writes a coefficient that is a vector's element of the channel.
template <typename P>
TFOPS_INLINE void CopyCoefficients(const Job& job, Coefficient k, const void* vector, int64_t begin, int64_t end) {
  SetCoefficients<P>(job, k, begin, end, [=](int64_t c) { return static_cast<const P*>(vector)[c]; });
}

// Calls merge(slot, n) for each slot of partials that a channel has, n being its number of elements: chunk by chunk,
// fold by fold. Slot s of channel c lies at s + c.
template <typename Body>
TFOPS_INLINE void ForEachPartial(const Problem& problem, const Partition& partition, Body merge) {
  for (int64_t chunk = 0; chunk < partition.chunks; ++chunk) {
    const int64_t row_begin = partition.RowBegin(chunk), row_end = partition.RowEnd(chunk);
    for (int64_t f = 0; f < partition.fold; ++f) {
      int64_t n = row_end - row_begin;
      if (!partition.channels_last) {
        n = ElementsBefore(problem, partition, row_end) - ElementsBefore(problem, partition, row_begin);
      } else if (partition.HasTail(chunk) && f * problem.channels < partition.tail) {
        ++n;
      }
      merge(chunk * partition.columns + f * problem.channels, n);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The forward pass: what moments come to.

// The mean of channel c as a plain average of its partial means: for infinities, which no deviation can tell.
inline double AverageOfPartials(const Job& job, int64_t c) {
  double count = 0, sum = 0;
  ForEachPartial(job.problem, job.partition, [&](int64_t slot, int64_t n) {
    if (n == 0) return;
    count += static_cast<double>(n);
    sum += static_cast<double>(n) * job.partials.first[slot + c];
  });
  return sum / count;
}

// Merges the partial moments of channels begin to end into their first. Returns their count. Means are merged by what
// they deviate from that first one: each step would round the mean itself, which may be large beside the deviations.
inline double MergePartials(const Job& job, int64_t begin, int64_t end) {
  constexpr int64_t kChannels = 256;
  double* __restrict mean = job.partials.first;
  double* __restrict m2 = job.partials.second;
  double count = 0;
  for (int64_t first = begin; first < end; first += kChannels) {
    const int64_t last = Min(first + kChannels, end);
    double deviation[kChannels] = {};
    count = 0;
    ForEachPartial(job.problem, job.partition, [&](int64_t slot, int64_t n) {
      const double added = static_cast<double>(n);
      if (count > 0 && added > 0) {
        const MergeWeights weights(count, added);
        for (int64_t c = first; c < last; ++c) {
          const double delta = (mean[slot + c] - mean[c]) - deviation[c - first];
          deviation[c - first] += delta * weights.share;
          m2[c] += m2[slot + c] + delta * delta * weights.cross;
        }
      }
      count += added;
    });
    for (int64_t c = first; c < last; ++c) {
      const double merged = mean[c] + deviation[c - first];
      mean[c] = merged - merged == 0 ? merged : AverageOfPartials(job, c);
    }
  }
  return count;
}

// Writes the vectors that training returns, of channels begin to end. Of several virtual batches, each leaves its mean
// and m2 to be averaged.
template <typename P>
void WriteStatistics(const ForwardJob& job, int64_t begin, int64_t end) {
  const Problem problem = job.problem;
  const ForwardArrays arrays = job.arrays;
  const double* mean = job.partials.first;
  const double* m2 = job.partials.second;
  const double count = MergePartials(job, begin, end);
  const auto moments = [=](int64_t c) {
    return count > 0 ? Moments<double>{count, mean[c], m2[c]} : Moments<double>{0, 0, 0};
  };
  if (job.whole.virtual_batches == 1) {
#pragma GCC ivdep
    for (int64_t c = begin; c < end; ++c) WriteRunningStatistics<P>(problem, arrays, moments(c), c);
  }
#pragma GCC ivdep
  for (int64_t c = begin; c < end; ++c) WriteSavedStatistics<P>(problem, arrays, moments(c), c);
}

// Calls add(first, second, k) with the finished partials of each virtual batch, in their order, for sums of a channel
// that begin with 0.
template <typename Add>
TFOPS_INLINE void ForFinished(const Job& job, Add add) {
  for (int64_t k = 0; job.problem.Count() > 0 && k < job.whole.virtual_batches; ++k) {
    add(job.partials.first + k * job.partials_apart, job.partials.second + k * job.partials_apart, k);
  }
}

// Writes the running statistics, which take in the average of all virtual batches' own.
template <typename P>
void AverageVirtualBatches(const ForwardJob& job, int64_t begin, int64_t end) {
  const double count = static_cast<double>(job.problem.Count());
  for (int64_t c = begin; c < end; ++c) {
    TakenIn sums = {0, 0};
    ForFinished(job, [&](const double* mean, const double* m2, int64_t) {
      const TakenIn taken = StatisticsToTakeIn(job.problem, Moments<double>{count, mean[c], m2[c]});
      sums.mean += taken.mean;
      sums.variance += taken.variance;
    });
    WriteAverageStatistics<P>(job.whole, job.arrays, sums, c);
  }
}

template <typename P>
void FinishStatisticsOf(const ForwardJob& job, int64_t begin, int64_t end) {
  const ForwardArrays arrays = job.arrays;
  const bool training = job.problem.training;
  const double epsilon = job.problem.epsilon;
  if (training) WriteStatistics<P>(job, begin, end);
  CopyCoefficients<P>(job, kMean, training ? arrays.saved_mean : arrays.mean, begin, end);
  const P* scale = static_cast<const P*>(arrays.scale);
  if (training) {
    const P* inv_std = static_cast<const P*>(arrays.saved_inv_std);
    SetCoefficients<P>(job, kSlope, begin, end,
                       [=](int64_t c) { return Slope<P>(scale[c], static_cast<double>(inv_std[c])); });
  } else {
    const P* variance = static_cast<const P*>(arrays.variance);
    SetCoefficients<P>(job, kSlope, begin, end, [=](int64_t c) {
      return Slope<P>(scale[c], InverseStd(static_cast<double>(variance[c]), epsilon));
    });
  }
  CopyCoefficients<P>(job, kOffset, arrays.offset, begin, end);
}

// Likewise, of the elements that a mask lets through: each chunk has a count of its own, and folded rows were seen one
// by one. The counts of the whole become the first chunk's.
inline void MergeMaskedPartials(const Job& job, int64_t begin, int64_t end) {
  double* mean = job.partials.first;
  double* m2 = job.partials.second;
  double* count = job.partials.count;
  ForEachPartial(job.problem, job.partition, [&](int64_t slot, int64_t) {
    if (slot == 0 || slot % job.partition.columns != 0) return;
    for (int64_t c = begin; c < end; ++c) {
      const Moments<double> a{count[c], mean[c], m2[c]}, b{count[slot + c], mean[slot + c], m2[slot + c]};
      const Moments<double> both = Merge(a, b);
      count[c] = both.count;
      mean[c] = both.mean;
      m2[c] = both.m2;
    }
  });
}

// Writes what the partial moments of channels `begin` to `end` come to.
template <typename P>
void FinishMomentsOf(const ForwardJob& job, int64_t begin, int64_t end) {
  const double* mean = job.partials.first;
  const double* m2 = job.partials.second;
  const double* counts = job.mask.flags ? job.partials.count : nullptr;
  const double count = counts ? 0 : MergePartials(job, begin, end);
  if (counts) MergeMaskedPartials(job, begin, end);
  for (int64_t c = begin; c < end; ++c) {
    const double n = counts && job.partition.chunks > 0 ? counts[c] : count;
    static_cast<P*>(job.moments.count)[c] = static_cast<P>(n);
    static_cast<P*>(job.moments.mean)[c] = static_cast<P>(n > 0 ? mean[c] : 0);
    static_cast<P*>(job.moments.variance)[c] = static_cast<P>(n > 0 ? m2[c] / n : 0);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The backward pass: coefficients of z before the sums, gradients and the coefficients of dx after them.

template <typename P>
void PrepareGradientOf(const BackwardJob& job, int64_t begin, int64_t end) {
  const Problem problem = job.problem;
  const BackwardArrays arrays = job.arrays;
  const P* scale = static_cast<const P*>(arrays.scale);
  const auto slope = [=](int64_t c) { return Slope<P>(scale[c], InverseStd<P>(problem, arrays, c)); };
  if (problem.in_place) {
    const Rounding rounding = RoundingOf(problem);
    SetCoefficients<P>(job, kMean, begin, end, [=](int64_t c) {
      return InverseSlope<P>(rounding, slope(c), scale[c], static_cast<const P*>(arrays.offset)[c]);
    });
  } else {
    CopyCoefficients<P>(job, kMean, arrays.mean, begin, end);
  }
  SetCoefficients<P>(job, kSlope, begin, end, slope);
  CopyCoefficients<P>(job, kOffset, arrays.offset, begin, end);
}

template <typename P>
void FinishGradientOf(const BackwardJob& job, int64_t begin, int64_t end) {
  double* sum_dz = job.partials.first;
  double* sum_dz_xc = job.partials.second;
  ForEachPartial(job.problem, job.partition, [&](int64_t slot, int64_t) {
    if (slot == 0) return;
    for (int64_t c = begin; c < end; ++c) {
      sum_dz[c] += sum_dz[slot + c];
      sum_dz_xc[c] += sum_dz_xc[slot + c];
    }
  });
  const Problem problem = job.problem;
  const BackwardArrays arrays = job.arrays;
  const bool empty = problem.Count() == 0;
  P* tilt = static_cast<P*>(job.coefficients[kTilt]);
  P* shift = static_cast<P*>(job.coefficients[kShift]);
  const auto dz = [=](int64_t c) { return empty ? 0 : sum_dz[c]; };
  const auto dz_xc = [=](int64_t c) { return empty ? 0 : sum_dz_xc[c]; };
  if (job.whole.virtual_batches == 1) {
#pragma GCC ivdep
    for (int64_t c = begin; c < end; ++c) WriteGradients<P>(problem, arrays, dz(c), dz_xc(c), c);
  }
#pragma GCC ivdep
  for (int64_t c = begin; c < end; ++c) {
    const GradientCoefficients<P> finished = CoefficientsOfGradient<P>(problem, arrays, dz(c), dz_xc(c), c);
    tilt[c] = finished.tilt;
    shift[c] = finished.shift;
  }
  RepeatColumns<P>(job, kTilt, begin, end);
  RepeatColumns<P>(job, kShift, begin, end);
}

// Writes the gradients of scale and offset, which are sums over all virtual batches.
template <typename P>
void AddVirtualBatches(const BackwardJob& job, int64_t begin, int64_t end) {
  const P* inv_std = static_cast<const P*>(job.arrays.inv_std);
  for (int64_t c = begin; c < end; ++c) {
    double doffset = 0, dscale = 0;
    ForFinished(job, [&](const double* sum_dz, const double* sum_dz_xc, int64_t k) {
      doffset += sum_dz[c];
      dscale += sum_dz_xc[c] * static_cast<double>(inv_std[k * job.problem.channels + c]);
    });
    static_cast<P*>(job.arrays.doffset)[c] = static_cast<P>(doffset);
    static_cast<P*>(job.arrays.dscale)[c] = static_cast<P>(dscale);
  }
}

template <typename P>
void TakeStatisticsGradientOf(const BackwardJob& job, int64_t begin, int64_t end) {
  CopyCoefficients<P>(job, kTilt, job.statistics.tilt, begin, end);
  CopyCoefficients<P>(job, kShift, job.statistics.shift, begin, end);
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_CHANNELS_H_
