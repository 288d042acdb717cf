// How CUDA's tensors map to vectors, threads, steps and blocks.

#include "csrc/batch_norm/cuda/tiling.h"

#include <numeric>
#include <vector>

#include "csrc/batch_norm/cuda/streaming.h"
#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/tests/problems.h"
#include "csrc/tests/testing.h"
#include "csrc/tests/walks.h"

namespace tfops::cuda {
namespace {

constexpr int kProblems = 2000;
constexpr int64_t kMostElements = 50'000;
constexpr int kMultiprocessors[] = {1, 3, 132};

int64_t ChannelOf(const Problem& problem, int64_t element) { return element / problem.inner % problem.channels; }

// Every vector is aligned, and its lanes are of the channels that the walk says. Together they are the tensor.
template <Direction kDirection>
void ExpectEveryElementOnce(const Problem& problem, const Tiling& tiling, int64_t share_steps) {
  Cover cover;
  bool aligned = true, channels = true;
  ForVectors<kDirection>(tiling, share_steps, [&](const auto& walk, const Step&) {
    aligned = aligned && walk.Offset() % tiling.lanes == 0;
    walk.ForLanes(tiling, [&](int lane, int64_t channel) {
      channels = channels && channel == ChannelOf(problem, walk.Offset() + lane);
    });
    cover.Add(walk.Offset(), tiling.lanes);
  });
  EXPECT_TRUE(aligned);
  EXPECT_TRUE(channels);
  EXPECT_TRUE(cover.Is(problem.Elements()));
}

TEST(StreamingWalksEveryElementOnce) {
  ForSmallProblems(kProblems, kMostElements, [](const Problem& problem, Random* random) {
    const StreamingTiling tiling = MakeStreamingTiling(problem, random->Flag(), random->Of(kMultiprocessors));
    ExpectEveryElementOnce<Direction::kForward>(problem, tiling, tiling.split_steps);
    ExpectEveryElementOnce<Direction::kBackward>(problem, tiling, tiling.split_steps);
  });
}

TEST(AnyBlockWalksEveryElementOnce) {
  ForSmallProblems(kProblems, kMostElements, [](const Problem& problem, Random* random) {
    const View view = MakeView(problem, random->Flag(), 1 << 30, random->Flag());
    const Extent block = RandomBlock(view, /*has_bits=*/false, random);
    const Tiling tiling = MakeTiling(view, block, block.x * block.y * block.z, random->Flag());
    ExpectEveryElementOnce<Direction::kForward>(problem, tiling, random->Below(tiling.steps) + 1);
  });
}

// A walk of many steps comes where one comes that begins there; and every element is found where it should be.
TEST(WalksReachHugeTensors) {
  ForHugeProblems(kProblems, [](const Problem& problem, Random* random) {
    const StreamingTiling tiling = MakeStreamingTiling(problem, random->Flag(), random->Of(kMultiprocessors));
    const Extent& block = tiling.block;
    for (int i = 0; i < 10; ++i) {
      const int64_t element = random->Below(problem.Elements() / tiling.lanes) * tiling.lanes;
      const int64_t row = element / tiling.RowElements();
      const int64_t in_row = element % tiling.RowElements();
      const int64_t unit = tiling.planes ? in_row / tiling.inner : in_row;
      const int64_t vector = (tiling.planes ? in_row % tiling.inner : in_row) / tiling.lanes;
      const int64_t slab = tiling.planes ? unit / block.y : vector / block.x;
      const int64_t step = row / block.z * tiling.steps_across + (tiling.planes ? vector / block.x : 0);
      const Place place{static_cast<int>(vector % block.x), static_cast<int>(tiling.planes ? unit % block.y : 0),
                        static_cast<int>(row % block.z)};
      EXPECT_LT(slab, tiling.slabs);
      EXPECT_LT(step, tiling.steps);
      WithLanes(tiling.lanes, [&](auto lanes) {
        constexpr int kLanes = decltype(lanes)::value;
        const Walk<kLanes, Direction::kForward> there(tiling, place, slab, step, 1, 0);
        EXPECT_TRUE(there.Inside());
        EXPECT_EQ(there.Offset(), element);
        there.ForLanes(tiling,
                       [&](int lane, int64_t channel) { EXPECT_EQ(channel, ChannelOf(problem, element + lane)); });
        const int64_t before = random->Below(std::min<int64_t>(step, 100) + 1);
        Walk<kLanes, Direction::kForward> forward(tiling, place, slab, step - before, before + 1, 0);
        for (int64_t k = 0; k < before; ++k) forward.Advance();
        EXPECT_EQ(forward.Offset(), element);
        EXPECT_TRUE(forward.Inside());
        const int64_t after = random->Below(std::min<int64_t>(tiling.steps - step, 100));
        Walk<kLanes, Direction::kBackward> backward(tiling, place, slab, step, after + 1, 0);
        for (int64_t k = 0; k < after; ++k) backward.Advance();
        EXPECT_EQ(backward.Offset(), element);
        EXPECT_TRUE(backward.Inside());
      });
    }
  });
}

// Whether rows put together by `repeat` are of whole vectors, and may be had.
bool MayRepeat(const Problem& problem, int64_t repeat, int lanes, int64_t most_units) {
  const int64_t row = problem.channels * problem.inner;
  return row * repeat % lanes == 0 && row * repeat <= most_units && problem.outer % repeat == 0;
}

TEST(VectorsAreTakenWhereTheyCanBe) {
  const auto expect = [](const Problem& problem, Random* random) {
    const bool aligned = random->Below(4) > 0, fold_bits = random->Flag();
    const int64_t most_units = random->Flag() ? 1 << 30 : 1 << random->Below(20);
    const View view = MakeView(problem, aligned, most_units, fold_bits);
    const int lanes = 16 / ElementBytes(problem.dtype);
    EXPECT_EQ(view.RowElements() * view.outer, problem.Elements());
    EXPECT_EQ(view.channels, problem.channels);
    EXPECT_TRUE(view.lanes == 1 || view.lanes == lanes);
    EXPECT_EQ((view.planes ? view.inner : view.units) % view.lanes, 0);
    EXPECT_EQ(view.units, problem.channels * view.UnitsPerChannel());
    if (view.Folded()) {
      EXPECT_TRUE(!view.planes);
      EXPECT_LE(view.units, most_units);
      EXPECT_TRUE(fold_bits || !NeedsActivationBits(problem));
    }
    // The least repetition is taken, and none where it is not needed, or is of no use.
    const int64_t run = problem.channels == 1 ? problem.Elements()
                        : problem.inner > 1   ? problem.inner
                                              : problem.channels;
    const bool may_fold = problem.channels > 1 && (fold_bits || !NeedsActivationBits(problem));
    int64_t least = 0;
    for (int64_t repeat = lanes; repeat > 0; --repeat) {
      if (may_fold && MayRepeat(problem, repeat, lanes, most_units)) least = repeat;
    }
    const bool wide = aligned && (run % lanes == 0 || least > 0);
    EXPECT_EQ(view.lanes, wide ? lanes : 1);
    EXPECT_EQ(view.Folded(), wide && run % lanes != 0);
    if (view.Folded()) EXPECT_EQ(view.repeat, least);
  };
  ForSmallProblems(10 * kProblems, kMostElements, expect);
  ForHugeProblems(kProblems, expect);
}

// CUDA's limits, the kernels' own, and blocks that all have work.
TEST(StreamingKeepsItsLimits) {
  const auto expect = [](const Problem& problem, Random* random) {
    const bool aligned = random->Flag();
    const int multiprocessors = random->Of(kMultiprocessors);
    const StreamingTiling tiling = MakeStreamingTiling(problem, aligned, multiprocessors);
    EXPECT_LE(tiling.block.x * tiling.block.y * tiling.block.z, StreamingTuning::kThreads);
    EXPECT_LE(tiling.block.z, 64);
    EXPECT_EQ(tiling.grid.x, tiling.slabs);
    EXPECT_LE(tiling.grid.y, 65535);
    EXPECT_LE(tiling.steps, tiling.Splits() * tiling.split_steps);
    EXPECT_LT((tiling.Splits() - 1) * tiling.split_steps, tiling.steps);
    EXPECT_EQ(SplitItems(problem, aligned, multiprocessors), tiling.Splits() * tiling.units);
    if (NeedsActivationBits(problem))
      EXPECT_EQ(tiling.block.x * tiling.lanes % 8, 0);  // threads that share a byte of bits
    // Units whose results pass through memory have elements enough beside them.
    if (tiling.Folded()) EXPECT_LE(tiling.units * StreamingTuning::kMinFoldedRows, problem.Elements());
  };
  ForSmallProblems(10 * kProblems, kMostElements, expect);
  ForHugeProblems(kProblems, expect);
}

// A vector has no elements that count beside others that do not.
TEST(VectorsCountAsAWhole) {
  ForSmallProblems(kProblems, kMostElements, [](const Problem& problem, Random* random) {
    const uint8_t flag = 1;
    Mask mask;
    mask.flags = &flag;
    const int64_t divisor = random->Below(problem.inner) + 1;
    mask.length = problem.inner == 1 ? problem.channels : std::gcd(problem.inner, divisor);
    const StreamingTiling tiling = MakeStreamingTiling(problem, mask, true, 132);
    bool whole = true;
    ForVectors(tiling, tiling.split_steps, [&](const auto& walk, const Step&) {
      whole = whole && walk.Offset() / mask.length == (walk.Offset() + tiling.lanes - 1) / mask.length;
    });
    EXPECT_TRUE(whole);
    EXPECT_TRUE(MakeStreamingTiling(problem, Mask{}, true, 132).lanes == MakeStreamingTiling(problem, true, 132).lanes);
  });
}

}  // namespace
}  // namespace tfops::cuda
