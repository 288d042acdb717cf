// The cut of the CPU's problems into items, and the ways in which kernels go through these.

#include "csrc/batch_norm/cpu/plan.h"

#include <algorithm>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#include "csrc/batch_norm/cpu/runs.h"
#include "csrc/tests/problems.h"
#include "csrc/tests/testing.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

constexpr int kProblems = 1500;
constexpr int64_t kMostElements = 3 << 20;  // of more than one item, and of chunks

// A run's elements are of the channels that its column says.
void ExpectChannels(const Problem& problem, const Plan& plan, const Run& run) {
  const auto channel = [&problem](int64_t element) { return element / problem.inner % problem.channels; };
  const int64_t last = run.offset + run.length - 1;
  const int64_t last_column = plan.channels_last ? run.column + run.length - 1 : run.column;
  EXPECT_EQ(channel(run.offset), run.column % problem.channels);
  EXPECT_EQ(channel(last), last_column % problem.channels);
  if (!plan.channels_last) EXPECT_EQ(run.offset / problem.inner, last / problem.inner);
}

TEST(ItemsCoverEveryElementOnce) {
  ForSmallProblems(kProblems, kMostElements, [](const Problem& problem, Random*) {
    for (const bool backward : {false, true}) {
      const Plan plan = MakePlan(problem, backward);
      Cover cover;
      for (int64_t item = 0; item < plan.Items(); ++item) {
        ForEachRun(problem, plan, item, [&](const Run& run) {
          ExpectChannels(problem, plan, run);
          cover.Add(run.offset, run.length);
        });
      }
      EXPECT_TRUE(cover.Is(problem.Elements()));
    }
  });
}

// Four runs at a time, as moments and sums of channels-first data are taken.
TEST(RunsAtOnceCoverEveryElementOnce) {
  ForSmallProblems(kProblems, kMostElements, [](const Problem& problem, Random*) {
    const Plan plan = MakePlan(problem, /*backward=*/true);
    if (plan.channels_last) return;
    Cover cover;
    for (int64_t item = 0; item < plan.Items(); ++item) {
      ForEachGroup(plan, item, [&](int64_t begin, int64_t end) {
        EXPECT_LE(end - begin, kMaxGroup);
        ForEachRuns(problem, plan, item, begin, end, [&](const auto& runs, int64_t channel) {
          for (const Run& run : runs) {
            EXPECT_EQ(run.length, runs[0].length);
            EXPECT_EQ(run.column, channel);
            cover.Add(run.offset, run.length);
          }
        });
      });
    }
    EXPECT_TRUE(cover.Is(problem.Elements()));
  });
}

// Four rows at a time, as channels-last data are gone through by tiles.
TEST(TilesCoverEveryElementOnce) {
  ForSmallProblems(kProblems, kMostElements, [](const Problem& problem, Random*) {
    const Plan plan = MakePlan(problem, /*backward=*/false);
    if (!plan.channels_last) return;
    Cover cover;
    for (int64_t item = 0; item < plan.Items(); ++item) {
      const TileRows rows = TileRowsOfItem<float>(plan, item);
      const auto add = [&](int64_t offset, int64_t length) {
        const int64_t element = rows.first.offset + offset;
        EXPECT_EQ(element % problem.channels, rows.first.column % problem.channels);
        cover.Add(element, length);
      };
      ForEachTileRows(
          rows,
          [&](int64_t offset, int64_t stride) {
            for (int k = 0; k < kTileRows; ++k) add(offset + k * stride, rows.first.length);
          },
          [&](int64_t offset, int64_t count, int64_t length) {
            for (int64_t k = 0; k < count; ++k) add(offset + k * rows.stride, length);
          });
    }
    EXPECT_TRUE(cover.Is(problem.Elements()));
  });
}

// Of huge problems, items are looked at as column blocks and chunks, and runs only here and there.
TEST(ItemsCoverHugeProblemsOnce) {
  ForHugeProblems(kProblems, [](const Problem& problem, Random* random) {
    const Plan plan = MakePlan(problem, random->Flag());
    Cover rows, columns;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      rows.Add(plan.RowBegin(chunk), plan.RowEnd(chunk) - plan.RowBegin(chunk));
      EXPECT_EQ(plan.HasTail(chunk), plan.tail > 0 && chunk + 1 == plan.chunks);
      const int64_t item = chunk * plan.column_blocks + random->Below(plan.column_blocks);
      EXPECT_EQ(plan.Chunk(item), chunk);
    }
    for (int64_t item = 0; item < plan.column_blocks; ++item) {
      columns.Add(plan.ColumnBegin(item), plan.ColumnEnd(item) - plan.ColumnBegin(item));
      EXPECT_EQ(plan.ColumnBegin(item + (plan.chunks - 1) * plan.column_blocks), plan.ColumnBegin(item));
    }
    EXPECT_TRUE(rows.Is(plan.rows));
    EXPECT_TRUE(columns.Is(plan.columns));
    EXPECT_EQ(plan.Items(), plan.column_blocks * plan.chunks);

    const int64_t row = random->Below(plan.rows);
    if (plan.channels_last) {
      EXPECT_EQ(plan.rows * plan.columns + plan.tail, problem.Elements());
      const Run run = RowRun(plan, row, 0, plan.columns);
      ExpectChannels(problem, plan, run);
      EXPECT_EQ(run.offset, row * problem.channels * plan.fold);
      return;
    }
    EXPECT_EQ(plan.rows, problem.outer * plan.segments_per_plane);
    const int64_t channel = random->Below(problem.channels);
    const Run run = SegmentRun(problem, plan, row, channel);
    ExpectChannels(problem, plan, run);
    // Of its plane, what is before it.
    const int64_t before = run.offset - run.offset / problem.inner * problem.inner;
    EXPECT_EQ(run.offset / problem.inner / problem.channels * problem.inner + before,
              ElementsBefore(problem, plan, row));
    EXPECT_EQ(ElementsBefore(problem, plan, row + 1) - ElementsBefore(problem, plan, row), run.length);
    EXPECT_EQ(ElementsBefore(problem, plan, plan.rows), problem.Count());
  });
}

// What kernels and their buffers take for granted of any plan.
void ExpectLimits(const Problem& problem, bool backward) {
  const Plan plan = MakePlan(problem, backward);
  const bool takes_sums = backward || problem.training;
  EXPECT_TRUE(plan.chunks > 0 && plan.column_blocks > 0);
  // A chunk's sums, of two doubles a column, are small beside what they are of.
  EXPECT_TRUE(!takes_sums || plan.IsWhole() || problem.Elements() / (plan.chunks * plan.columns) >= 16);
  if (plan.channels_last) {
    EXPECT_LE(plan.column_block, kMaxColumns);
    EXPECT_LT(plan.tail, plan.columns);
    EXPECT_EQ(plan.columns, plan.fold * problem.channels);
    if (plan.fold > 1) {
      EXPECT_EQ(plan.columns % kBlock, 0);
      EXPECT_EQ(plan.column_blocks, 1);  // for the rows of an item have all channels
    }
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) EXPECT_EQ(plan.RowBegin(chunk) % kRowUnit, 0);
  } else {
    EXPECT_EQ(plan.columns, problem.channels);
    EXPECT_EQ(plan.fold, 1);
    EXPECT_TRUE(!takes_sums || plan.group <= kMaxGroup);
    EXPECT_LE(plan.segment, problem.inner);
  }
  // Chunks are as large as each other, but for a unit of rows and what is left over.
  const int64_t row_unit = plan.channels_last ? kRowUnit : 1;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int64_t rows = plan.RowEnd(chunk) - plan.RowBegin(chunk);
    EXPECT_LE(rows, plan.RowEnd(0) + row_unit - 1);
    EXPECT_LE(plan.RowEnd(0), rows + row_unit);
  }
  // Items, and runs of them, begin at whole bytes of activation bits.
  const int64_t unit = plan.channels_last ? plan.column_block : plan.segment;
  EXPECT_TRUE(unit % 8 == 0 || unit == (plan.channels_last ? plan.columns : problem.inner));
}

TEST(PlansKeepTheirLimits) {
  const auto expect = [](const Problem& problem, Random*) {
    ExpectLimits(problem, false);
    ExpectLimits(problem, true);
  };
  ForSmallProblems(kProblems, kMostElements, expect);
  ForHugeProblems(kProblems, expect);
}

TEST(ProblemsWithoutElementsHaveNoItems) {
  for (const auto& [outer, channels, inner] : {std::tuple(0, 5, 1), {0, 5, 7}, {4, 0, 1}, {4, 0, 7}, {4, 5, 0}}) {
    Problem problem;
    problem.outer = outer;
    problem.channels = channels;
    problem.inner = inner;
    for (const bool backward : {false, true}) EXPECT_EQ(MakePlan(problem, backward).Items(), 0);
  }
}

auto Fields(const Plan& plan) {
  return std::tuple(plan.channels_last, plan.columns, plan.rows, plan.fold, plan.tail, plan.segment,
                    plan.segments_per_plane, plan.group, plan.column_block, plan.column_blocks, plan.chunks);
}

// Not of the threads that there are, nor of the one that asks; nor of what has no part in the order of sums.
TEST(PlansAreOfTheProblemAlone) {
  static_assert(std::is_same_v<decltype(&MakePlan), Plan (*)(const Problem&, bool)>);
  std::vector<Problem> problems;
  ForSmallProblems(kProblems, kMostElements, [&](const Problem& problem, Random*) { problems.push_back(problem); });
  const auto plans = [&problems] {
    std::vector<decltype(Fields({}))> fields;
    for (const Problem& problem : problems) fields.push_back(Fields(MakePlan(problem, /*backward=*/true)));
    return fields;
  };
  const auto expected = plans();
  for (Problem& problem : problems) {
    problem.epsilon = 0.5;
    problem.exponential_avg_factor = 0.25;
    problem.unbiased = false;
    problem.training = !problem.training;
    problem.activation = Activation::kSilu;
  }
  std::vector<std::thread> threads;
  bool equal[3];
  for (bool& is : equal) threads.emplace_back([&] { is = plans() == expected; });
  for (std::thread& thread : threads) thread.join();
  for (const bool is : equal) EXPECT_TRUE(is);
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL
