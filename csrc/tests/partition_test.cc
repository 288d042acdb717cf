// The cut of the CPU's problems into items, and the ways in which kernels go through these.

#include "csrc/batch_norm/cpu/partition.h"

#include <algorithm>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#include "csrc/batch_norm/cpu/runs.h"
#include "csrc/batch_norm/cpu/tiles.h"
#include "csrc/tests/problems.h"
#include "csrc/tests/testing.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

constexpr int kProblems = 1500;
constexpr int64_t kMostElements = 3 << 20;  // of more than one item, and of chunks

// A run's elements are of the channels that its column says.
void ExpectChannels(const Problem& problem, const Partition& partition, const Run& run) {
  const auto channel = [&problem](int64_t element) { return element / problem.inner % problem.channels; };
  const int64_t last = run.offset + run.length - 1;
  const int64_t last_column = partition.channels_last ? run.column + run.length - 1 : run.column;
  EXPECT_EQ(channel(run.offset), run.column % problem.channels);
  EXPECT_EQ(channel(last), last_column % problem.channels);
  if (!partition.channels_last) EXPECT_EQ(run.offset / problem.inner, last / problem.inner);
}

TEST(ItemsCoverEveryElementOnce) {
  ForSmallProblems(kProblems, kMostElements, [](const Problem& problem, Random*) {
    for (const bool backward : {false, true}) {
      const Partition partition = MakePartition(problem, backward);
      Cover cover;
      for (int64_t item = 0; item < partition.Items(); ++item) {
        ForEachRun(problem, partition, item, [&](const Run& run) {
          ExpectChannels(problem, partition, run);
          cover.Add(run.offset, run.length);
        });
      }
      EXPECT_TRUE(cover.Is(problem.Elements()));
    }
  });
}

// Channels-first data are gone through by four runs at a time, for moments and sums.
TEST(RunsAtOnceCoverEveryElementOnce) {
  ForSmallProblems(kProblems, kMostElements, [](const Problem& problem, Random*) {
    const Partition partition = MakePartition(problem, /*backward=*/true);
    if (partition.channels_last) return;
    Cover cover;
    for (int64_t item = 0; item < partition.Items(); ++item) {
      ForEachGroup(partition, item, [&](int64_t begin, int64_t end) {
        EXPECT_LE(end - begin, kMaxGroup);
        ForEachRuns(problem, partition, item, begin, end, [&](const auto& runs, int64_t channel) {
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

// Channels-last data are gone through by tiles of four rows.
TEST(TilesCoverEveryElementOnce) {
  ForSmallProblems(kProblems, kMostElements, [](const Problem& problem, Random*) {
    const Partition partition = MakePartition(problem, /*backward=*/false);
    if (!partition.channels_last) return;
    Cover cover;
    for (int64_t item = 0; item < partition.Items(); ++item) {
      const TileRows rows = TileRowsOfItem<float>(partition, item);
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

// Huge problems' items are looked at as column blocks and chunks, and runs only here and there.
TEST(ItemsCoverHugeProblemsOnce) {
  ForHugeProblems(kProblems, [](const Problem& problem, Random* random) {
    const Partition partition = MakePartition(problem, random->Flag());
    Cover rows, columns;
    for (int64_t chunk = 0; chunk < partition.chunks; ++chunk) {
      rows.Add(partition.RowBegin(chunk), partition.RowEnd(chunk) - partition.RowBegin(chunk));
      EXPECT_EQ(partition.HasTail(chunk), partition.tail > 0 && chunk + 1 == partition.chunks);
      const int64_t item = chunk * partition.column_blocks + random->Below(partition.column_blocks);
      EXPECT_EQ(partition.Chunk(item), chunk);
    }
    for (int64_t item = 0; item < partition.column_blocks; ++item) {
      columns.Add(partition.ColumnBegin(item), partition.ColumnEnd(item) - partition.ColumnBegin(item));
      EXPECT_EQ(partition.ColumnBegin(item + (partition.chunks - 1) * partition.column_blocks),
                partition.ColumnBegin(item));
    }
    EXPECT_TRUE(rows.Is(partition.rows));
    EXPECT_TRUE(columns.Is(partition.columns));
    EXPECT_EQ(partition.Items(), partition.column_blocks * partition.chunks);

    const int64_t row = random->Below(partition.rows);
    if (partition.channels_last) {
      EXPECT_EQ(partition.rows * partition.columns + partition.tail, problem.Elements());
      const Run run = RowRun(partition, row, 0, partition.columns);
      ExpectChannels(problem, partition, run);
      EXPECT_EQ(run.offset, row * problem.channels * partition.fold);
      return;
    }
    EXPECT_EQ(partition.rows, problem.outer * partition.segments_per_plane);
    const int64_t channel = random->Below(problem.channels);
    const Run run = SegmentRun(problem, partition, row, channel);
    ExpectChannels(problem, partition, run);
    // `before`: the elements of the plane that come before the run.
    const int64_t before = run.offset - run.offset / problem.inner * problem.inner;
    EXPECT_EQ(run.offset / problem.inner / problem.channels * problem.inner + before,
              ElementsBefore(problem, partition, row));
    EXPECT_EQ(ElementsBefore(problem, partition, row + 1) - ElementsBefore(problem, partition, row), run.length);
    EXPECT_EQ(ElementsBefore(problem, partition, partition.rows), problem.Count());
  });
}

// What kernels and their buffers take for granted of any partition.
void ExpectLimits(const Problem& problem, bool backward) {
  const Partition partition = MakePartition(problem, backward);
  const bool takes_sums = backward || problem.training;
  EXPECT_TRUE(partition.chunks > 0 && partition.column_blocks > 0);
  // A chunk's sums, of two doubles a column, are small beside what they are of.
  EXPECT_TRUE(!takes_sums || partition.IsWhole() || problem.Elements() / (partition.chunks * partition.columns) >= 16);
  if (partition.channels_last) {
    EXPECT_LE(partition.column_block, kMaxColumns);
    EXPECT_LT(partition.tail, partition.columns);
    EXPECT_EQ(partition.columns, partition.fold * problem.channels);
    if (partition.fold > 1) {
      EXPECT_EQ(partition.columns % kBlock, 0);
      EXPECT_EQ(partition.column_blocks, 1);  // for the rows of an item have all channels
    }
    for (int64_t chunk = 0; chunk < partition.chunks; ++chunk) EXPECT_EQ(partition.RowBegin(chunk) % kRowUnit, 0);
  } else {
    EXPECT_EQ(partition.columns, problem.channels);
    EXPECT_EQ(partition.fold, 1);
    EXPECT_TRUE(!takes_sums || partition.group <= kMaxGroup);
    EXPECT_LE(partition.segment, problem.inner);
  }
  // Chunks are as large as each other, but for a unit of rows and what is left over.
  const int64_t row_unit = partition.channels_last ? kRowUnit : 1;
  for (int64_t chunk = 0; chunk < partition.chunks; ++chunk) {
    const int64_t rows = partition.RowEnd(chunk) - partition.RowBegin(chunk);
    EXPECT_LE(rows, partition.RowEnd(0) + row_unit - 1);
    EXPECT_LE(partition.RowEnd(0), rows + row_unit);
  }
  // Items, and runs of them, begin at whole bytes of activation bits.
  const int64_t unit = partition.channels_last ? partition.column_block : partition.segment;
  EXPECT_TRUE(unit % 8 == 0 || unit == (partition.channels_last ? partition.columns : problem.inner));
}

TEST(PartitionsKeepTheirLimits) {
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
    for (const bool backward : {false, true}) EXPECT_EQ(MakePartition(problem, backward).Items(), 0);
  }
}

auto Fields(const Partition& partition) {
  return std::tuple(partition.channels_last, partition.columns, partition.rows, partition.fold, partition.tail,
                    partition.segment, partition.segments_per_plane, partition.group, partition.column_block,
                    partition.column_blocks, partition.chunks);
}

// A partition depends neither on the threads that there are, nor on the one that asks, nor on what has no part in the
// order of sums.
TEST(PartitionsAreOfTheProblemAlone) {
  static_assert(std::is_same_v<decltype(&MakePartition), Partition (*)(const Problem&, bool, bool)>);
  std::vector<Problem> problems;
  ForSmallProblems(kProblems, kMostElements, [&](const Problem& problem, Random*) { problems.push_back(problem); });
  const auto partitions = [&problems] {
    std::vector<decltype(Fields({}))> fields;
    for (const Problem& problem : problems) fields.push_back(Fields(MakePartition(problem, /*backward=*/true)));
    return fields;
  };
  const auto expected = partitions();
  for (Problem& problem : problems) {
    problem.epsilon = 0.5;
    problem.exponential_avg_factor = 0.25;
    problem.unbiased = false;
    problem.training = !problem.training;
    problem.activation = Activation::kSilu;
  }
  std::vector<std::thread> threads;
  bool equal[3];
  for (bool& is : equal) threads.emplace_back([&] { is = partitions() == expected; });
  for (std::thread& thread : threads) thread.join();
  for (const bool is : equal) EXPECT_TRUE(is);
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL
