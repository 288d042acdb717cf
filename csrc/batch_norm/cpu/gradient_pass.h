// The two passes of the gradient: sums of dz and dz * (x - mean), then dx and dresidual. dz is computed in both.

#ifndef TFOPS_BATCH_NORM_CPU_GRADIENT_PASS_H_
#define TFOPS_BATCH_NORM_CPU_GRADIENT_PASS_H_

#include <type_traits>

#include "csrc/batch_norm/cpu/elements.h"
#include "csrc/batch_norm/cpu/gradient_arrays.h"
#include "csrc/batch_norm/cpu/moments_pass.h"
#include "csrc/batch_norm/cpu/runs.h"
#include "csrc/batch_norm/moments.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Gradient moments, channels-last: as in ColumnChain.

// Adds kRows rows to the sums of each of `columns` columns.
template <Activation kActivation, int kRows, typename T, typename A>
TFOPS_INLINE void AddRows(const GradientArrays<T, A> (&rows)[kRows], const ColumnCoefficients<Param<T>>& coefficients,
                          int64_t columns, Param<T>* sum_dz, Param<T>* sum_dz_xc) {
  using P = Param<T>;
  ForEachVector<P>(columns, [&](auto partial, int64_t j, int64_t n) {
    Vec<P> first{}, second{};
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kActivation != Activation::kNone) FetchAhead(rows[r], j);  // else cores see it coming
      const Gradient<P> g = GradientOfVector<decltype(partial)::value, kActivation>(rows[r], coefficients, j, n);
      first += g.dz;
      second += g.dz * g.xc;
    }
    Store(sum_dz + j, Load(sum_dz + j) + first);
    Store(sum_dz_xc + j, Load(sum_dz_xc + j) + second);
  });
}

// A chain of the sums of columns `begin` to `end`: `steps` times kRows rows from `row` on, which are `apart` rows apart
// within a step.
template <Activation kActivation, int kRows, typename T, typename A>
TFOPS_INLINE void AddColumnChain(const BackwardJob& job, int64_t row, int64_t steps, int64_t apart, int64_t begin,
                                 int64_t end, double* sum_dz, double* sum_dz_xc) {
  using P = Param<T>;
  alignas(64) P sums[kMaxColumns];
  alignas(64) P products[kMaxColumns];
  uint8_t buffers[kRows][kRunBitsBytes];
  const ColumnCoefficients<P> coefficients(job.coefficients, begin);
  for (int64_t j = 0; j < end - begin; ++j) sums[j] = products[j] = P(0);
  for (int64_t i = 0; i < steps; ++i) {
    GradientArrays<T, A> rows[kRows];
    for (int k = 0; k < kRows; ++k) {
      const Run run = RowRun(job.partition, row + i + k * apart, begin, end);
      const uint8_t* bits = BitsOfRun(job.problem, job.partition, run, job.arrays.activation_bits, buffers[k]);
      rows[k] = ArraysOfRun<T, A>(job, run, bits, job.sums_ahead);
    }
    AddRows<kActivation, kRows>(rows, coefficients, end - begin, sums, products);
  }
  for (int64_t j = 0; j < end - begin; ++j) {
    sum_dz[begin + j] += static_cast<double>(sums[j]);
    sum_dz_xc[begin + j] += static_cast<double>(products[j]);
  }
}

// What is less than kRows rows. Out of line and of any arrays, for all chunks may have some, and little of it.
template <Activation kActivation, typename T>
__attribute__((noinline)) void AddLastRows(const BackwardJob& job, int64_t row, int64_t count, int64_t begin,
                                           int64_t end, double* sum_dz, double* sum_dz_xc) {
  AddColumnChain<kActivation, 1, T, AnyArrays>(job, row, count, 0, begin, end, sum_dz, sum_dz_xc);
}

template <typename T>
void ColumnGradientMoments(const BackwardJob& job, int64_t item) {
  constexpr int kRowsAtOnce = 4;
  constexpr int64_t kSteps = kChainRows / kRowsAtOnce;
  const Partition& partition = job.partition;
  const int64_t chunk = partition.Chunk(item);
  const int64_t columns_begin = partition.ColumnBegin(item), columns_end = partition.ColumnEnd(item);
  const int64_t begin = partition.RowBegin(chunk), end = partition.RowEnd(chunk);
  const int64_t apart = (end - begin) / kRowsAtOnce;
  const int64_t rest = begin + apart * kRowsAtOnce;
  double* sum_dz = job.partials.first + chunk * partition.columns;
  double* sum_dz_xc = job.partials.second + chunk * partition.columns;
  for (int64_t j = columns_begin; j < columns_end; ++j) sum_dz[j] = sum_dz_xc[j] = 0;
  WithActivation(job.problem.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    WithArraysOfSums<kActivation>(job, [&](auto known) {
      for (int64_t i = 0; i < apart; i += kSteps) {
        AddColumnChain<kActivation, kRowsAtOnce, T, decltype(known)>(job, begin + i, Min(kSteps, apart - i), apart,
                                                                     columns_begin, columns_end, sum_dz, sum_dz_xc);
      }
    });
    const auto add_last_rows = [&](int64_t row, int64_t count, int64_t from, int64_t to) {
      AddLastRows<kActivation, T>(job, row, count, from, to, sum_dz, sum_dz_xc);
    };
    if (rest < end) add_last_rows(rest, end - rest, columns_begin, columns_end);
    if (partition.HasTail(chunk)) add_last_rows(partition.rows, 1, 0, partition.tail);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradient moments, channels-first: as in MomentsChain.

template <Activation kActivation, typename T>
class GradientChain {
  using P = Param<T>;

 public:
  void Begin() {
    sum_dz = sum_dz_xc = 0;
    Clear();
  }

  // Adds the elements of kRuns runs, all of one length.
  template <typename A, int kRuns>
  TFOPS_INLINE void Add(const GradientArrays<T, A> (&runs)[kRuns], const VectorCoefficients<P>& coefficients) {
    constexpr int64_t kPiece = kChainElements<kRuns, kChainRows, P>;
    const int64_t length = runs[0].length;
    for (int64_t begin = 0; begin < length; begin += kPiece) {
      const int64_t end = Min(begin + kPiece, length);
      const int64_t additions = AdditionsOf<kRuns, P>(end - begin);
      if (additions_ + additions > kChainRows) Flush();
      ForEachVectorInTurn<kRuns, P>(begin, end, [&](auto partial, int v, int r, int64_t i, int64_t lanes) {
        FetchAhead(runs[r], i);
        const auto g = GradientOfVector<decltype(partial)::value, kActivation>(runs[r], coefficients, i, lanes);
        first_[v] += g.dz;
        second_[v] += g.dz * g.xc;
      });
      additions_ += additions;
    }
  }

  void Flush() {
    sum_dz += SumOfAll<P>(first_);
    sum_dz_xc += SumOfAll<P>(second_);
    Clear();
  }

  double sum_dz;
  double sum_dz_xc;

 private:
  void Clear() {
    for (int v = 0; v < kUnroll; ++v) first_[v] = second_[v] = Vec<P>{};
    additions_ = 0;
  }

  Vec<P> first_[kUnroll];
  Vec<P> second_[kUnroll];
  int64_t additions_;
};

template <typename T>
void PlaneGradientMoments(const BackwardJob& job, int64_t item) {
  const Partition& partition = job.partition;
  const int64_t chunk = partition.Chunk(item);
  WithActivation(job.problem.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    WithArraysOfSums<kActivation>(job, [&](auto known) {
      using A = decltype(known);
      ForEachGroup(partition, item, [&](int64_t begin, int64_t end) {
        GradientChain<kActivation, T> chains[kMaxGroup];
        for (int64_t c = begin; c < end; ++c) chains[c - begin].Begin();
        ForEachRuns(job.problem, partition, item, begin, end, [&](const auto& runs, int64_t c) {
          constexpr int kRuns = std::extent_v<std::remove_reference_t<decltype(runs)>>;
          GradientArrays<T, A> arrays[kRuns];
          for (int k = 0; k < kRuns; ++k) {
            const uint8_t* bits = BitsInPlace(job.problem, partition, runs[k], job.arrays.activation_bits);
            arrays[k] = ArraysOfRun<T, A>(job, runs[k], bits, job.sums_ahead);
          }
          chains[c - begin].Add(arrays, ChannelCoefficients<Param<T>>(job.coefficients, c));
        });
        for (int64_t c = begin; c < end; ++c) {
          GradientChain<kActivation, T>& chain = chains[c - begin];
          chain.Flush();
          job.partials.first[chunk * partition.columns + c] = chain.sum_dz;
          job.partials.second[chunk * partition.columns + c] = chain.sum_dz_xc;
        }
      });
    });
  });
}

template <typename T>
void GradientMomentsItem(const BackwardJob& job, int64_t item) {
  if (job.partition.channels_last) {
    ColumnGradientMoments<T>(job, item);
  } else {
    PlaneGradientMoments<T>(job, item);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Channels: coefficients before the sums, gradients and the other coefficients after.

template <typename T>
void PrepareGradientOf(const BackwardJob& job, int64_t begin, int64_t end) {
  using P = Param<T>;
  const Problem problem = job.problem;  // copies, which no store changes
  const BackwardArrays arrays = job.arrays;
  SpreadVector<P>(job, job.coefficients.mean, arrays.mean, begin, end);
  Spread<P>(job, job.coefficients.slope, begin, end, [=](int64_t c) {
    return Slope<P>(static_cast<const P*>(arrays.scale)[c], InverseStd<P>(problem, arrays, c));
  });
  SpreadVector<P>(job, job.coefficients.offset, arrays.offset, begin, end);
}

template <typename T>
void FinishGradientOf(const BackwardJob& job, int64_t begin, int64_t end) {
  using P = Param<T>;
  double* sum_dz = job.partials.first;
  double* sum_dz_xc = job.partials.second;
  ForEachPartial(job.problem, job.partition, [&](int64_t slot, int64_t) {
    if (slot == 0) return;
    for (int64_t c = begin; c < end; ++c) {
      sum_dz[c] += sum_dz[slot + c];
      sum_dz_xc[c] += sum_dz_xc[slot + c];
    }
  });
  const Problem problem = job.problem;  // copies, which no store changes
  const BackwardArrays arrays = job.arrays;
  const bool empty = problem.Count() == 0;
  P* tilt = static_cast<P*>(job.coefficients.tilt);
  P* shift = static_cast<P*>(job.coefficients.shift);
  const auto dz = [=](int64_t c) { return empty ? 0 : sum_dz[c]; };
  const auto dz_xc = [=](int64_t c) { return empty ? 0 : sum_dz_xc[c]; };
  // A loop each, as in WriteStatistics.
#pragma GCC ivdep
  for (int64_t c = begin; c < end; ++c) WriteGradients<P>(problem, arrays, dz(c), dz_xc(c), c);
#pragma GCC ivdep
  for (int64_t c = begin; c < end; ++c) {
    const GradientCoefficients<P> finished = CoefficientsOfGradient<P>(problem, arrays, dz(c), dz_xc(c), c);
    tilt[c] = finished.tilt;
    shift[c] = finished.shift;
  }
  RepeatColumns(job, tilt, begin, end);
  RepeatColumns(job, shift, begin, end);
}

// ---------------------------------------------------------------------------------------------------------------------
// dx = dz * slope + (x - mean) * tilt + shift

template <typename P, typename C>
TFOPS_INLINE Vec<P> DxOf(const Gradient<P>& g, const C& coefficients, bool training, int64_t i) {
  // Left to GCC, the second sum is fused with its product in some loops, and in others not.
  const Vec<P> rest = training ? MultiplyAdd(g.xc, coefficients.Tilt(i), coefficients.Shift(i)) : Vec<P>{};
  return MultiplyAdd(g.dz, coefficients.Slope(i), rest);
}

// Writes dx, and dresidual, of lanes i and on from what has been read of them.
template <bool kPartial, Activation kActivation, typename T, typename A, typename C>
TFOPS_INLINE void WriteGradient(const GradientArrays<T, A>& arrays, const Gradient<Param<T>>& g, const C& coefficients,
                                bool training, int64_t i, int64_t n, bool stream) {
  const Vec<Param<T>> dx = DxOf(g, coefficients, training, i);
  // dresidual first: it may be dy itself, but so may dx, and both have been read.
  if (arrays.HasDresidual()) {
    const Stored<T> dresidual = EncodeDz<kActivation, T>(g.dz);
    StoreLanes<kPartial>(arrays.dresidual + i, dresidual, n, stream && arrays.IsDresidualStreamed());
  }
  StoreLanes<kPartial>(arrays.dx + i, Encode<T>(dx), n, stream && arrays.IsDxStreamed());
}

template <bool kPartial, Activation kActivation, bool kInPlace = !kPartial, typename T, typename A, typename C>
TFOPS_INLINE void GradientNormalizeVector(const GradientArrays<T, A>& arrays, const C& coefficients, bool training,
                                          int64_t i, int64_t n, bool stream) {
  const auto g = GradientOfVector<kPartial, kActivation, kInPlace>(arrays, coefficients, i, n);
  WriteGradient<kPartial, kActivation>(arrays, g, coefficients, training, i, n, stream);
}

// As NormalizeSome.
template <Activation kActivation, typename T, typename A, typename C>
TFOPS_INLINE void GradientNormalizeSome(const GradientArrays<T, A>& arrays, const C& coefficients, bool training,
                                        int64_t begin, int64_t end) {
  for (int64_t i = begin, n; i < end; i += n) {
    n = Min(kLanes<Param<T>>, end - i);
    GradientNormalizeVector<true, kActivation>(arrays, coefficients, training, i, n, false);
  }
}

// As NormalizeOutsideLines.
template <Activation kActivation, typename T, typename C>
__attribute__((noinline)) void GradientNormalizeOutsideLines(const GradientArrays<T, AnyArrays> arrays,
                                                             const C coefficients, bool training, int64_t begin,
                                                             int64_t end) {
  GradientNormalizeSome<kActivation>(arrays, coefficients, training, begin, end);
}

// Returns where they end. Unless they are streamed, `begin` is a multiple of the lanes.
template <Activation kActivation, bool kStream, typename T, typename A, typename C>
TFOPS_INLINE int64_t GradientNormalizeVectors(const GradientArrays<T, A> arrays, const C coefficients, bool training,
                                              int64_t begin, int64_t end) {
  constexpr int kL = kLanes<Param<T>>;
  int64_t i = begin;
  for (; i + kL <= end; i += kL) {
    FetchAhead(arrays, i);
    GradientNormalizeVector<false, kActivation, !kStream>(arrays, coefficients, training, i, kL, kStream);
  }
  return i;
}

// A cache line of dresidual at a time, and then as much of dx. Were they written in turns vector by vector, lines would
// leave for memory half full as soon as what is read next lies at the same place of its page as they do. So would they
// if both were computed first, and then written one right after the other, at the same place of two pages.
template <Activation kActivation, typename T, typename A, typename C>
TFOPS_INLINE int64_t GradientNormalizeLines(const GradientArrays<T, A> arrays, const C coefficients, bool training,
                                            int64_t begin, int64_t end) {
  constexpr int kL = kLanes<Param<T>>;
  constexpr int kVectors = static_cast<int>(kLineElements<T> / kL);
  int64_t i = begin;
  for (; i + kVectors * kL <= end; i += kVectors * kL) {
    FetchAhead(arrays, i);
    Gradient<Param<T>> g[kVectors];
    uint32_t bits = 0;
    if constexpr (kIsPiecewiseLinear<kActivation>) {
      if (arrays.HasBits()) bits = LoadActivationBits<kVectors * kL>(arrays.bits, i);
    }
    for (int v = 0; v < kVectors; ++v) {
      g[v] = GradientOfBits<false, kActivation>(arrays, coefficients, i + v * kL, kL, bits, v * kL);
    }
    Stored<T> line[kVectors];
    if (arrays.HasDresidual()) {
      for (int v = 0; v < kVectors; ++v) line[v] = EncodeDz<kActivation, T>(g[v].dz);
      StoreLine(arrays.dresidual + i, line, arrays.IsDresidualStreamed());
    }
    for (int v = 0; v < kVectors; ++v) line[v] = Encode<T>(DxOf(g[v], coefficients, training, i + v * kL));
    StoreLine(arrays.dx + i, line, arrays.IsDxStreamed());
  }
  return i;
}

template <Activation kActivation, typename T, typename A, typename C>
TFOPS_INLINE void GradientNormalizeStreamed(const GradientArrays<T, A>& arrays, const C& coefficients, bool training,
                                            StreamedLines lines) {
  constexpr int64_t kVectors = kLineElements<T> / kLanes<Param<T>>;
  int64_t i = lines.begin;
  if constexpr (kVectors > 1) {
    if (kVectors > 2 || arrays.HasDresidual()) {
      i = GradientNormalizeLines<kActivation>(arrays, coefficients, training, i, lines.end);
    }
  }
  GradientNormalizeVectors<kActivation, true>(arrays, coefficients, training, i, lines.end);
}

template <Activation kActivation, typename T, typename A, typename C>
TFOPS_INLINE void GradientNormalizeRun(GradientArrays<T, A> arrays, const C& coefficients, bool training) {
  StreamedLines lines;
  if (arrays.IsDxStreamed()) lines = LinesToStream(arrays.dx, arrays.length);
  if (arrays.IsDresidualStreamed()) {
    const StreamedLines others = LinesToStream(arrays.dresidual, arrays.length);
    if (!arrays.IsDxStreamed()) lines = others;
    arrays.stream_dresidual = others == lines;
  }
  constexpr int kL = kLanes<Param<T>>;
  const int64_t length = arrays.length;
  if (!lines.IsEmpty()) {
    const auto normalize_outside = [&](int64_t begin, int64_t end) {
      if (begin >= end) return;
      GradientNormalizeOutsideLines<kActivation, T>(arrays.Forgotten(), coefficients, training, begin, end);
    };
    normalize_outside(0, lines.begin);
    GradientNormalizeStreamed<kActivation>(arrays, coefficients, training, lines);
    return normalize_outside(lines.end, length);
  }
  const bool overlaps = OverlapsItsEnd<T>(length), at_once = IsReadAtOnce<T>(length);
  const int64_t last = length - kL;
  Gradient<Param<T>> g{};
  const auto read_last = [&] {
    g = GradientOfVector<false, kActivation, /*kInPlace=*/false>(arrays, coefficients, last, kL);
  };
  if (overlaps && at_once) read_last();
  const int64_t end = overlaps && !at_once ? last : length;
  int64_t i = GradientNormalizeVectors<kActivation, false>(arrays, coefficients, training, 0, end);
  if (overlaps) {
    if (!at_once) read_last();
    for (; i < last; i += kL) GradientNormalizeVector<false, kActivation>(arrays, coefficients, training, i, kL, false);
    WriteGradient<false, kActivation>(arrays, g, coefficients, training, last, kL, false);
  } else {
    GradientNormalizeSome<kActivation>(arrays, coefficients, training, i, length);
  }
}

// A run whose arrays may be any: out of line, for it is what is left over in many places, or rare.
template <Activation kActivation, typename T, typename C>
__attribute__((noinline)) void GradientNormalizeAnyRun(const GradientArrays<T, AnyArrays> arrays, const C coefficients,
                                                       bool training) {
  GradientNormalizeRun<kActivation>(arrays, coefficients, training);
}

// As NormalizeRest, of arrays that have the length.
template <Activation kActivation, typename T>
__attribute__((noinline)) void GradientNormalizeRest(const GradientArrays<T, AnyArrays> arrays,
                                                     const ColumnCoefficients<Param<T>> coefficients, bool training,
                                                     int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    GradientNormalizeAnyRun<kActivation>(arrays.From(r * stride, arrays.length), coefficients, training);
  }
}

// As NormalizeTiles.
template <Activation kActivation, Traversal kTraversal, typename T, typename A>
TFOPS_INLINE void GradientNormalizeTiles(const GradientArrays<T, A> arrays,
                                         const ColumnCoefficients<Param<T>> coefficients, bool training,
                                         int64_t stride) {
  using P = Param<T>;
  constexpr int kL = kLanes<P>;
  int64_t i = 0;
  for (; i + kTileColumns<T> <= arrays.length; i += kTileColumns<T>) {
    VectorCoefficients<P> loaded[kTileVectors<T>];
    for (int v = 0; v < kTileVectors<T>; ++v) loaded[v] = coefficients.template Loaded</*kAll=*/true>(i + v * kL);
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < kTileVectors<T>; ++v) {
        const int64_t at = r * stride + i + v * kL;
        GradientNormalizeVector<false, kActivation>(arrays, loaded[v], training, at, kL,
                                                    kTraversal == Traversal::kStreamed);
      }
    }
  }
  if (i < arrays.length) {
    const auto rest = arrays.From(i, arrays.length - i).Forgotten();
    GradientNormalizeRest<kActivation>(rest, coefficients.From(i), training, kTileRows, stride);
  }
}

template <Traversal kTraversal, typename T>
void GradientNormalizeTiledItem(const BackwardJob& job, int64_t item) {
  const TileRows rows = TileRowsOfItem<T>(job.partition, item);
  const uint8_t* bits = BitsInPlace(job.problem, job.partition, rows.first, job.arrays.activation_bits);
  const ColumnCoefficients<Param<T>> coefficients(job.coefficients, rows.first.column);
  WithActivation(job.problem.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    WithArraysOfDx<kActivation, kTraversal>(job, [&](auto known) {
      using A = decltype(known);
      const bool training = A::kAreKnown || job.problem.training;
      const auto arrays = ArraysOfRun<T, A>(job, rows.first, bits, job.dx_ahead);
      const auto normalize_tiles = [&](int64_t offset, int64_t stride) {
        const auto first = arrays.From(offset, rows.first.length);
        GradientNormalizeTiles<kActivation, kTraversal>(first, coefficients, training, stride);
      };
      ForEachTileRows(rows, normalize_tiles, [&](int64_t offset, int64_t count, int64_t length) {
        const auto rest = arrays.From(offset, length).Forgotten();
        GradientNormalizeRest<kActivation>(rest, coefficients, training, count, rows.stride);
      });
    });
  });
  if (job.stream_dx || job.stream_dresidual) StreamFence();
}

template <typename T>
void GradientNormalizeItem(const BackwardJob& job, int64_t item) {
  using P = Param<T>;
  const auto normalize_tiled = [&](auto traversal) {
    GradientNormalizeTiledItem<decltype(traversal)::value, T>(job, item);
  };
  if (WithTraversal<T>(job.traversal, job.partition, normalize_tiled)) return;
  WithActivation(job.problem.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    WithArraysOfDx<kActivation>(job, [&](auto known) {
      using A = decltype(known);
      const auto normalize = [&](const GradientArrays<T, A>& arrays, const auto& coefficients) {
        if constexpr (A::kAreKnown) {
          GradientNormalizeRun<kActivation>(arrays, coefficients, /*training=*/true);
        } else {
          GradientNormalizeAnyRun<kActivation>(arrays, coefficients, job.problem.training);
        }
      };
      if (!job.partition.channels_last) {
        return ForEachSegment(job.problem, job.partition, item, [&](const Run& run) {
          const uint8_t* bits = BitsInPlace(job.problem, job.partition, run, job.arrays.activation_bits);
          normalize(ArraysOfRun<T, A>(job, run, bits, job.dx_ahead),
                    ChannelCoefficients<P>(job.coefficients, run.column));
        });
      }
      ForEachRow(job.partition, item, [&](const Run& run) {
        uint8_t buffer[kRunBitsBytes];
        const uint8_t* bits = BitsOfRun(job.problem, job.partition, run, job.arrays.activation_bits, buffer);
        normalize(ArraysOfRun<T, A>(job, run, bits, job.dx_ahead), ColumnCoefficients<P>(job.coefficients, run.column));
      });
    });
  });
  if (job.stream_dx || job.stream_dresidual) StreamFence();
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_GRADIENT_PASS_H_
