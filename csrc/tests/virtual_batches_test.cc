// Virtual batches: which ones there can be, and where each lies.

#include "csrc/batch_norm/virtual_batches.h"

#include <string>
#include <vector>

#include "csrc/batch_norm/cuda/policy.h"
#include "csrc/batch_norm/cuda/streaming.h"
#include "csrc/tests/problems.h"
#include "csrc/tests/testing.h"
#include "csrc/tests/walks.h"

namespace tfops {
namespace {

// The same with `outer` that many times, in as many virtual batches.
Problem Repeated(Problem problem, int64_t batches) {
  problem.training = true;
  problem.outer *= batches;
  problem.virtual_batches = batches;
  return problem;
}

TEST(VirtualBatchesDivideTheBatch) {
  Random random(5);
  for (int i = 0; i < 2000; ++i) {
    std::vector<int64_t> dims(2 + random.Below(4));
    for (int64_t& dim : dims) dim = random.Below(20);
    const int rank = static_cast<int>(dims.size());
    const int64_t axis = random.Below(2 * rank) - rank, size = random.Below(8) - 1;
    Problem problem;
    EXPECT_TRUE(Fold(dims.data(), rank, axis, &problem).ok());
    const Status status = SetVirtualBatches(dims.data(), rank, axis, size, &problem);
    const bool has_channels = axis == 0 || axis == -rank;
    const bool good = size == 0 || (size > 0 && !has_channels && dims[0] % size == 0);
    testing::about = std::to_string(dims[0]) + ", axis " + std::to_string(axis) + ", size " + std::to_string(size);
    EXPECT_EQ(status.ok(), good);
    if (!good) {
      EXPECT_EQ(status.message.rfind("virtual_batch_size must ", 0), size_t{0});
      continue;
    }
    EXPECT_EQ(problem.virtual_batches, size == 0 ? 1 : dims[0] / size);
    EXPECT_TRUE(Validate(problem).ok());
    EXPECT_EQ(Repeated(problem, 3).Count(), problem.outer * problem.inner);
    problem.training = false;
    EXPECT_EQ(Validate(problem).ok(), problem.virtual_batches == 1);
  }
}

TEST(NumbersOfVirtualBatchesAreChecked) {
  Problem problem;
  problem.outer = 12;
  problem.channels = 3;
  for (int64_t batches = -2; batches <= 13; ++batches) {
    problem.virtual_batches = batches;
    testing::about = std::to_string(batches);
    EXPECT_EQ(Validate(problem).ok(), batches > 0 && 12 % batches == 0);
  }
  problem.outer = problem.virtual_batches = 0;
  EXPECT_TRUE(Validate(problem).ok());
}

// What each has of activation bits is what it would have by itself, and begins at a whole byte.
TEST(VirtualBatchesHaveTheirOwnBits) {
  ForSmallProblems(1000, 100'000, [](const Problem& one, Random* random) {
    const int64_t batches = 1 + random->Below(5);
    const Problem whole = Repeated(one, batches);
    EXPECT_EQ(LayoutOfActivationBits(whole).Bytes(), batches * LayoutOfActivationBits(one).Bytes());
    EXPECT_EQ(LayoutOfActivationBits(whole).row_elements, LayoutOfActivationBits(one).row_elements);
  });
}

// Threads of each virtual batch come to its own elements, each of them once, and to its bits.
TEST(VirtualBatchesAreWalkedThroughOneByOne) {
  ForSmallProblems(300, 20'000, [](Problem one, Random* random) {
    one.training = one.has_residual = true;
    one.activation = Activation::kRelu;
    const int64_t batches = 1 + random->Below(4);
    const Problem whole = Repeated(one, batches);
    const bool aligned = random->Flag();
    const cuda::StreamingTiling tiling = cuda::MakeStreamingTiling(whole, aligned, 16);
    EXPECT_LE(tiling.lanes, aligned ? 16 / ElementBytes(one.dtype) : 1);
    if (batches > 1 && one.Elements() * ElementBytes(one.dtype) % 16 != 0) EXPECT_EQ(tiling.lanes, 1);
    const int64_t bytes = LayoutOfActivationBits(one).Bytes();
    Cover cover;
    for (int64_t k = 0; k < batches; ++k) {
      const auto expect = [&](const auto& walk, const Step&) {
        cover.Add(walk.Offset(), tiling.lanes);
        EXPECT_EQ(walk.Offset() / one.Elements(), k);
        EXPECT_EQ(walk.BitsOffset(tiling, k) / bytes, k);
      };
      ForVectors(tiling, tiling.split_steps, expect, k);
    }
    EXPECT_TRUE(cover.Is(whole.Elements()));
  });
}

// Each tier takes all virtual batches at once, but for the grid, which takes none.
TEST(PlansAreOverAllVirtualBatches) {
  Problem one;
  one.outer = 392;
  one.channels = 64;
  for (const int64_t batches : {2, 16, 300}) {
    for (const cuda::Pass pass : {cuda::Pass::kForward, cuda::Pass::kBackward}) {
      cuda::Situation situation;
      situation.problem = Repeated(one, batches);
      situation.pass = pass;
      situation.occupancy = cuda::OccupancyOnPaper(situation.device);
      for (const cuda::Choice& choice : cuda::BestChoices(situation, {})) {
        EXPECT_TRUE(choice.tier != cuda::Tier::kGrid);
        const int64_t blocks = choice.plan.Blocks() * batches;
        if (choice.tier == cuda::Tier::kOneBlock) {
          EXPECT_EQ(choice.waves, cuda::DivideUp(blocks, situation.occupancy.blocks));
        }
      }
    }
  }
}

}  // namespace
}  // namespace tfops
