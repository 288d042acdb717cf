// Sums over a thread's share of each channel, over a block, and over the partial results of blocks: moments in the
// forward pass, two sums in the backward pass. Deterministic: the order of every sum follows from the tiling alone.
//
// A thread sums in short chains, one to each lane of its vectors, and closes a chain into its total every
// Tuning::kChain vectors or so. So rounding errors grow with the length of a chain plus the number of chains, not with
// their product. From the block on, sums are in double.

#ifndef TFOPS_BATCH_NORM_CUDA_SUMS_CUH_
#define TFOPS_BATCH_NORM_CUDA_SUMS_CUH_

#include "csrc/batch_norm/cuda/intrinsics.cuh"
#include "csrc/batch_norm/cuda/tiling.h"
#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/batch_norm/cuda/types.cuh"
#include "csrc/batch_norm/cuda/walk.cuh"
#include "csrc/batch_norm/moments.h"

namespace tfops::cuda {

// --- A thread ------------------------------------------------------------------------------------------------------

// Sums of x - center and of its square, in chains. The center of a chain is the mean of those before it: what its
// distance from the chain's own mean adds to the squares, and loses to rounding, it adds to m2 as well, in proportion
// to the elements before. So chains are short at first: the first one has to take the center from its first element,
// which may be an outlier.
template <typename F, int kLanes>
class MomentsAccumulator {
 public:
  __device__ __forceinline__ void Add(const F (&x)[kLanes]) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!started_) center_[lane] = FiniteOrZero(x[lane]);
      const F deviation = x[lane] - center_[lane];
      sum_[lane] += deviation;
      squares_[lane] = MultiplyAdd(deviation, deviation, squares_[lane]);
    }
    started_ = true;
    ++chain_;
  }

  // Closes the chain if it is nearly full, or twice as long as all before it. It has to be called after no more than
  // `steps` calls of Add().
  __device__ __forceinline__ void CloseLongChain(int steps) {
    if (static_cast<F>(chain_) >= 2 * count_ || chain_ > Tuning::kChain - steps) CloseChain();
  }

  // Merges the chain by Chan's rule, as Merge() of moments.h does, with both means about the center.
  __device__ __forceinline__ void CloseChain() {
    if (chain_ == 0) return;
    const F length = static_cast<F>(chain_);
    const F inverse = 1 / length;
    const F share = length / (count_ + length);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const F chain_mean = sum_[lane] * inverse;
      const F chain_m2 = squares_[lane] - sum_[lane] * chain_mean;
      const F delta = chain_mean - mean_[lane];
      const F mean = MergedMean(mean_[lane], chain_mean, delta * share);
      m2_[lane] += (chain_m2 < F(0) ? F(0) : chain_m2) + delta * delta * (count_ * share);
      const F center = FiniteOrZero(center_[lane] + mean);
      mean_[lane] = (center_[lane] - center) + mean;
      center_[lane] = center;
      sum_[lane] = squares_[lane] = 0;
    }
    count_ += length;
    chain_ = 0;
  }

  // Of the closed chains. The mean is that of two numbers together which a single one of F would be too coarse for.
  __device__ __forceinline__ F Count() const { return count_; }
  __device__ __forceinline__ F MeanAbout(F origin, int lane) const { return (center_[lane] - origin) + mean_[lane]; }
  __device__ __forceinline__ F SumOfSquares(int lane) const { return m2_[lane]; }

 private:
  bool started_ = false;
  int chain_ = 0;  // vectors in the open chain
  F center_[kLanes] = {};
  F sum_[kLanes] = {};
  F squares_[kLanes] = {};
  F count_ = 0;          // of the closed chains
  F mean_[kLanes] = {};  // of theirs, less the center
  F m2_[kLanes] = {};
};

// Whether the vector at an offset counts, which it does as a whole: MakeStreamingTiling has seen to that.
__device__ __forceinline__ bool IsCounted(const Mask& mask, int64_t offset) {
  return !mask.flags || LoadGlobal(mask.flags + offset / mask.length) != 0;
}

// Adds what a walk comes to, with kBatch vectors in flight.
template <typename T, int kBatch, int kLanes>
__device__ __forceinline__ void AddMoments(Walk<kLanes, Direction::kForward>* walk, const void* x, const Mask& mask,
                                           MomentsAccumulator<Arithmetic<T>, kLanes>* accumulator) {
  while (!walk->Done()) {
    Vector<T, kLanes> batch[kBatch];
    bool counts[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      counts[i] = walk->Inside() && IsCounted(mask, walk->Offset());
      if (counts[i]) batch[i].Load(x, walk->Offset());
      walk->Advance();
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!counts[i]) continue;
      Arithmetic<T> values[kLanes];
      batch[i].Unpack(values);
      accumulator->Add(values);
    }
    accumulator->CloseLongChain(kBatch);
  }
}

// Sums of dz and of dz * xc, in chains.
template <typename F, int kLanes>
class GradientAccumulator {
 public:
  __device__ __forceinline__ void Add(const F (&dz)[kLanes], const F (&xc)[kLanes]) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      sums_[0][lane] += dz[lane];
      sums_[1][lane] = MultiplyAdd(dz[lane], xc[lane], sums_[1][lane]);
    }
    ++chain_;
  }

  __device__ __forceinline__ void CloseLongChain(int steps) {
    if (chain_ > Tuning::kChain - steps) CloseChain();
  }

  __device__ __forceinline__ void CloseChain() {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      totals_[0][lane] += sums_[0][lane];
      totals_[1][lane] += sums_[1][lane];
      sums_[0][lane] = sums_[1][lane] = 0;
    }
    chain_ = 0;
  }

  // Of the closed chains.
  __device__ __forceinline__ const F (&Totals() const)[2][kLanes] { return totals_; }

 private:
  int chain_ = 0;
  F sums_[2][kLanes] = {};
  F totals_[2][kLanes] = {};
};

// --- A block -------------------------------------------------------------------------------------------------------

// Where in shared memory a block sums up; see BlockSums.
template <typename F>
struct SumsMemory {
  F* numbers;      // [numbers][units]
  double* parts;   // [parts][units]
  double* totals;  // [4][results]
};

// Calls body(lane, result) for each of a thread's lanes: the result that it adds to.
template <int kLanes, typename Body>
__device__ __forceinline__ void ForResults(const Tiling& tiling, const Place& place, const Body& body) {
  const BlockSums& sums = tiling.sums;
  const int unit = place.x * kLanes;
  if (tiling.planes || sums.repeat * sums.pixels == 1) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) body(lane, tiling.planes ? place.y : unit + lane);
    return;
  }
  ForFoldedLanes<kLanes>(static_cast<unsigned>(unit), static_cast<unsigned>(sums.pixels),
                         static_cast<unsigned>(sums.results), body);
}

// totals[v][r] = the sum of values[v][lane] over all threads and lanes of result r. All threads of the block take part,
// and see the totals.
template <int kValues, typename F, int kLanes>
__device__ __forceinline__ void SumOverBlock(const Tiling& tiling, const Place& place,
                                             const F (&values)[kValues][kLanes], const SumsMemory<F>& memory,
                                             double* totals) {
  const BlockSums& sums = tiling.sums;
  const int threads = BlockThreads();
  const int thread = ThreadInBlock();
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    if (place.z < tiling.block.z) {
      if (tiling.planes) {
        F sum = 0;
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) sum += values[v][lane];
        memory.numbers[(place.z * tiling.block.x + place.x) * sums.units + place.y] = sum;
      } else {
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          memory.numbers[place.z * sums.units + place.x * kLanes + lane] = values[v][lane];
        }
      }
    }
    __syncthreads();
    for (int i = thread; i < sums.units * sums.parts; i += threads) {
      const int part = i / sums.units;
      const int unit = i - part * sums.units;
      double sum = 0;
#pragma unroll 4
      for (int number = part; number < sums.numbers; number += sums.parts) {
        sum += static_cast<double>(memory.numbers[number * sums.units + unit]);
      }
      memory.parts[i] = sum;
    }
    __syncthreads();
    for (int r = thread; r < sums.results; r += threads) {
      double sum = 0;
      for (int part = 0; part < sums.parts; ++part) {
        for (int turn = 0; turn < sums.repeat; ++turn) {
          const double* const of_result = memory.parts + part * sums.units + (turn * sums.results + r) * sums.pixels;
#pragma unroll 4
          for (int pixel = 0; pixel < sums.pixels; ++pixel) sum += of_result[pixel];
        }
      }
      totals[v * sums.results + r] = sum;
    }
  }
  __syncthreads();
}

// Calls store(r, moments) for each result of the block, by one thread each. `most` is what a thread counts at most for
// a unit, times the numbers of one. Means are summed first. About that mean, which rounding has moved a little, the
// threads' own are summed again, and their squares with what the threads have about themselves.
template <typename F, int kLanes, typename Store>
__device__ __forceinline__ void MomentsOverBlock(const Tiling& tiling, const Place& place, F most,
                                                 const MomentsAccumulator<F, kLanes>& accumulator,
                                                 const SumsMemory<F>& memory, const Store& store) {
  const int results = tiling.sums.results;
  const F count = accumulator.Count();
  F values[2][kLanes];
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    values[0][lane] = count == F(0) ? F(0) : accumulator.MeanAbout(F(0), lane) * (count / most);
    values[1][lane] = count;
  }
  double* const means = memory.totals;
  double* const counts = means + results;
  SumOverBlock(tiling, place, values, memory, means);
  for (int r = ThreadInBlock(); r < results; r += BlockThreads()) {
    means[r] = static_cast<F>(counts[r] > 0 ? means[r] * (static_cast<double>(most) / counts[r]) : 0.0);
  }
  __syncthreads();
  ForResults<kLanes>(tiling, place, [&](int lane, int r) {
    const F delta = accumulator.MeanAbout(static_cast<F>(means[r]), lane);
    values[0][lane] = count == F(0) ? F(0) : delta * count;
    values[1][lane] = count == F(0) ? F(0) : MultiplyAdd(delta, delta * count, accumulator.SumOfSquares(lane));
  });
  double* const deviations = counts + results;
  SumOverBlock(tiling, place, values, memory, deviations);
  for (int r = ThreadInBlock(); r < results; r += BlockThreads()) {
    const double shift = counts[r] > 0 ? deviations[r] / counts[r] : 0.0;
    const double m2 = deviations[results + r] - deviations[r] * shift;
    // Beside an infinite mean there is no shift, which is NaN then.
    store(r, Moments<double>{counts[r], means[r] + FiniteOrZero(shift), m2 < 0 ? 0.0 : m2});
  }
}

// The sums of the backward pass, as partial results.
struct GradientSums {
  double dz;
  double dz_xc;
};

// Likewise calls store(r, sums).
template <typename F, int kLanes, typename Store>
__device__ __forceinline__ void GradientsOverBlock(const Tiling& tiling, const Place& place,
                                                   const GradientAccumulator<F, kLanes>& accumulator,
                                                   const SumsMemory<F>& memory, const Store& store) {
  SumOverBlock(tiling, place, accumulator.Totals(), memory, memory.totals);
  for (int r = ThreadInBlock(); r < tiling.sums.results; r += BlockThreads()) {
    store(r, GradientSums{memory.totals[r], memory.totals[tiling.sums.results + r]});
  }
}

// --- Blocks --------------------------------------------------------------------------------------------------------

// The sum of partial results. All that are added, and all sums that are added, are about the same `reference`: the mean
// of the first that is of any element, which is within a few standard deviations of the whole's mean. So there is one
// division, at the end, for what Chan's rule would divide at each step.
template <typename Partial>
struct SumOf;

template <>
struct SumOf<Moments<double>> {
  double reference;
  double count;
  double deviations;
  double squares;

  __device__ __forceinline__ static SumOf About(const Moments<double>& one) {
    return {FiniteOrZero(one.mean), 0, 0, 0};
  }
  __device__ __forceinline__ static bool IsReference(const Moments<double>& one) { return one.count > 0; }
  __device__ __forceinline__ void Add(const Moments<double>& set) {
    const double delta = set.mean - reference;
    const double deviation = set.count * delta;
    count += set.count;
    deviations += deviation;
    squares += set.m2 + deviation * delta;
  }
  __device__ __forceinline__ void Add(const SumOf& other) {
    count += other.count;
    deviations += other.deviations;
    squares += other.squares;
  }
  // What the lane has that is so far from this one.
  __device__ __forceinline__ SumOf OfLane(int apart) const {
    return {reference, FromLane(count, apart), FromLane(deviations, apart), FromLane(squares, apart)};
  }
  __device__ __forceinline__ Moments<double> Result() const {
    if (count == 0) return {0, 0, 0};
    const double shift = deviations / count;
    const double m2 = squares - deviations * shift;
    return {count, reference + shift, m2 < 0 ? 0.0 : m2};
  }
};

template <>
struct SumOf<GradientSums> {
  GradientSums sums;

  __device__ __forceinline__ static SumOf About(const GradientSums&) { return {}; }
  __device__ __forceinline__ static bool IsReference(const GradientSums&) { return true; }
  __device__ __forceinline__ void Add(const GradientSums& other) {
    sums.dz += other.dz;
    sums.dz_xc += other.dz_xc;
  }
  __device__ __forceinline__ void Add(const SumOf& other) { Add(other.sums); }
  __device__ __forceinline__ SumOf OfLane(int apart) const {
    return {{FromLane(sums.dz, apart), FromLane(sums.dz_xc, apart)}};
  }
  __device__ __forceinline__ GradientSums Result() const { return sums; }
};

// The sum of get(0) to get(count - 1), by whole warps: this thread is the rank-th of `threads`. Lanes of a warp all get
// what the warp has added.
template <typename Partial, typename Get>
__device__ __forceinline__ SumOf<Partial> SumByWarps(int64_t count, int rank, int threads, const Get& get) {
  Partial reference = {};
  for (int64_t i = 0; i < count; ++i) {
    reference = get(i);
    if (SumOf<Partial>::IsReference(reference)) break;
  }
  auto sum = SumOf<Partial>::About(reference);
#pragma unroll 4
  for (int64_t i = rank; i < count; i += threads) sum.Add(get(i));
#pragma unroll 1
  for (int apart = 16; apart > 0; apart /= 2) sum.Add(sum.OfLane(apart));
  return sum;
}

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_SUMS_CUH_
