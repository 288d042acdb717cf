// Where activation bits lie: as batch_norm.h has it, as the CPU's runs do, and as CUDA's threads do.

#include "csrc/batch_norm/cpu/activation_bits.h"

#include <cstring>
#include <vector>

#include "csrc/batch_norm/cpu/partition.h"
#include "csrc/batch_norm/cpu/runs.h"
#include "csrc/batch_norm/cuda/streaming.h"
#include "csrc/tests/problems.h"
#include "csrc/tests/testing.h"
#include "csrc/tests/walks.h"

// The part of csrc/simt's machine that a load from memory asks for: nothing is counted.
namespace simt {
bool counting = false;
void OnMisaligned(const void*, size_t) { EXPECT_TRUE(!"misaligned"); }
void Count(const void*, size_t, Access) {}
}  // namespace simt

namespace tfops {
namespace {

constexpr int kProblems = 3000;
constexpr int64_t kMostElements = 100'000;

// The bit of an element, counted from the first of all bits, by what batch_norm.h says alone.
int64_t BitOf(const Problem& problem, int64_t element) {
  const int64_t row = problem.channels == 1 ? problem.Elements()
                      : problem.inner == 1  ? problem.channels
                                            : problem.inner;
  return element / row * ((row + 7) / 8 * 8) + element % row;
}

Problem WithActivationBits(Problem problem) {
  problem.training = problem.has_residual = true;
  problem.activation = Activation::kRelu;
  return problem;
}

// The CPU takes a single channel for one plane, as cpu.cc does.
Problem Simplified(Problem problem) {
  if (problem.channels == 1) {
    problem.inner = problem.Count();
    problem.outer = 1;
  }
  return problem;
}

bool Bit(const std::vector<uint8_t>& bytes, int64_t i) { return bytes[i / 8] >> i % 8 & 1; }

TEST(RowsOfActivationBitsAreWholeBytes) {
  const auto expect = [](const Problem& problem, Random* random) {
    const ActivationBitsLayout layout = LayoutOfActivationBits(problem);
    EXPECT_EQ(layout.rows * layout.row_elements, problem.Elements());
    EXPECT_LE(layout.row_elements, layout.row_bytes * 8);
    EXPECT_LT(layout.row_bytes * 8, layout.row_elements + 8);
    EXPECT_EQ(layout.Bytes(), layout.rows * layout.row_bytes);
    EXPECT_LT(BitOf(problem, problem.Elements() - 1), layout.Bytes() * 8);
    EXPECT_LE(layout.Bytes() * 8 - 7, BitOf(problem, problem.Elements() - 1) + 1);
    for (int i = 0; i < 10; ++i) {
      const int64_t element = random->Below(problem.Elements());
      const int64_t row = element / layout.row_elements;
      EXPECT_EQ(BitOf(problem, element), row * layout.row_bytes * 8 + element % layout.row_elements);
    }
    const ActivationBitsLayout simplified = LayoutOfActivationBits(Simplified(problem));
    EXPECT_EQ(simplified.Bytes(), layout.Bytes());
    EXPECT_EQ(simplified.row_elements, layout.row_elements);
  };
  ForSmallProblems(kProblems, kMostElements, expect);
  ForHugeProblems(kProblems, expect);
  Problem empty;
  empty.channels = 3;
  EXPECT_EQ(LayoutOfActivationBits(empty).Bytes(), 0);
}

// The gradient reads bits or the residual, never both, and one of them only where y is not linear in it.
TEST(GradientReadsBitsOrResidual) {
  for (const Activation activation : kActivations) {
    for (int flags = 0; flags < 4; ++flags) {
      Problem problem;
      problem.activation = activation;
      problem.has_residual = flags & 1;
      problem.training = flags & 2;
      testing::about = Shown(problem);
      const bool bits_do =
          activation == Activation::kRelu || activation == Activation::kRelu6 || activation == Activation::kLeakyRelu;
      EXPECT_EQ(NeedsActivationBits(problem), problem.has_residual && problem.training && bits_do);
      EXPECT_EQ(NeedsActivationBits(problem) || NeedsResidual(problem),
                problem.has_residual && activation != Activation::kNone);
      EXPECT_TRUE(!(NeedsActivationBits(problem) && NeedsResidual(problem)));
    }
  }
}

// --- CPU ----------------------------------------------------------------------------------------------------------

namespace runs = cpu::TFOPS_CPU_LEVEL;

// Calls body(problem, partition, item, run) for the runs of both passes' partitions.
template <typename Body>
void ForRuns(const Problem& drawn, Body body) {
  const Problem problem = Simplified(WithActivationBits(drawn));
  for (const bool backward : {false, true}) {
    const cpu::Partition partition = cpu::MakePartition(problem, backward);
    for (int64_t item = 0; item < partition.Items(); ++item) {
      runs::ForEachRun(problem, partition, item, [&](const runs::Run& run) { body(problem, partition, item, run); });
    }
  }
}

// Bits that are not buffered lie side by side from the run's first byte on, in one row or in rows without padding.
TEST(RunsBeginAtTheirBits) {
  ForSmallProblems(kProblems, kMostElements, [](const Problem& drawn, Random*) {
    ForRuns(drawn, [](const Problem& problem, const cpu::Partition& partition, int64_t, const runs::Run& run) {
      const int64_t bit = runs::BitsOffset(problem, partition, run) * 8;
      EXPECT_EQ(bit, BitOf(problem, run.offset));
      if (runs::AreBitsBuffered(problem, partition)) return;
      EXPECT_EQ(bit + run.length - 1, BitOf(problem, run.offset + run.length - 1));
    });
  });
  ForHugeProblems(kProblems, [](const Problem& drawn, Random* random) {
    const Problem problem = Simplified(WithActivationBits(drawn));
    const cpu::Partition partition = cpu::MakePartition(problem, random->Flag());
    const int64_t row = random->Below(partition.rows);
    const int64_t block = random->Below(partition.column_blocks);
    const runs::Run run = partition.channels_last
                              ? runs::RowRun(partition, row, partition.ColumnBegin(block), partition.ColumnEnd(block))
                              : runs::SegmentRun(problem, partition, row, random->Below(problem.channels));
    EXPECT_EQ(runs::BitsOffset(problem, partition, run) * 8, BitOf(problem, run.offset));
  });
}

// Items may be written at the same time: no byte is of two.
TEST(ItemsShareNoByteOfActivationBits) {
  ForSmallProblems(kProblems / 10, 20 * kMostElements, [](const Problem& drawn, Random*) {
    std::vector<int64_t> owners;
    bool shared = false;
    ForRuns(drawn, [&](const Problem& problem, const cpu::Partition&, int64_t item, const runs::Run& run) {
      if (run.offset == 0) owners.assign(LayoutOfActivationBits(problem).Bytes(), -1);
      for (int64_t byte = BitOf(problem, run.offset) / 8; byte <= BitOf(problem, run.offset + run.length - 1) / 8;
           ++byte) {
        shared = shared || (owners[byte] != -1 && owners[byte] != item);
        owners[byte] = item;
      }
    });
    EXPECT_TRUE(!shared);
  });
}

// Bits pass through a buffer, where they lie as the elements do, to the rows and back. Nothing else is written, and
// bits past a row's end are zero, or ignored.
TEST(BufferedBitsKeepTheirPlaces) {
  int64_t buffered = 0;
  ForSmallProblems(kProblems, kMostElements, [&](const Problem& drawn, Random* random) {
    ForRuns(drawn, [&](const Problem& problem, const cpu::Partition& partition, int64_t, const runs::Run& run) {
      if (!runs::AreBitsBuffered(problem, partition)) return;
      if (++buffered % 16 != 0) return;  // some of them do
      constexpr uint8_t kUntouched = 0xa5;
      const int64_t bytes = runs::BitsRunBytes(problem, run);
      EXPECT_LE((run.length + 7) / 8 + 8, runs::kRunBitsBytes);
      std::vector<uint8_t> buffer(runs::kRunBitsBytes), rows(bytes + 8, kUntouched), back(runs::kRunBitsBytes);
      for (uint8_t& byte : buffer) byte = static_cast<uint8_t>(random->Below(256));
      runs::ScatterBits(problem, run, buffer.data(), rows.data());
      std::vector<uint8_t> expected(bytes + 8);
      const int64_t first = BitOf(problem, run.offset);
      for (int64_t i = 0; i < run.length; ++i) {
        const int64_t bit = BitOf(problem, run.offset + i) - first;
        expected[bit / 8] |= Bit(buffer, i) << bit % 8;
      }
      std::memset(expected.data() + bytes, kUntouched, 8);
      EXPECT_TRUE(rows == expected);

      for (int64_t i = 0; i < run.length; i += problem.channels) {
        const int64_t end = BitOf(problem, run.offset + i) - first + problem.channels;
        rows[end / 8] |= static_cast<uint8_t>(0xff << end % 8);
      }
      runs::GatherBits(problem, run, rows.data(), back.data());
      bool equal = true;
      for (int64_t i = 0; i < run.length; ++i) equal = equal && Bit(back, i) == Bit(buffer, i);
      EXPECT_TRUE(equal);
    });
  });
  EXPECT_LT(1000, buffered);
}

// --- CUDA ---------------------------------------------------------------------------------------------------------

// A vector's bits are in one byte, where the thread says.
TEST(VectorsKnowTheirBits) {
  ForSmallProblems(kProblems / 3, kMostElements, [](const Problem& drawn, Random* random) {
    const Problem problem = WithActivationBits(drawn);
    const cuda::View view = cuda::MakeView(problem, random->Flag(), 1 << 30, /*fold_bits=*/false);
    const cuda::Tiling tiling = cuda::MakeTiling(view, RandomBlock(view, /*has_bits=*/true, random), 1, false);
    ForVectors(tiling, tiling.steps, [&](const auto& walk, const Step&) {
      const int64_t bit = walk.BitsOffset(tiling, /*virtual_batch=*/0) * 8 + walk.BitInByte();
      EXPECT_EQ(bit, BitOf(problem, walk.Offset()));
      EXPECT_EQ(bit / 8, BitOf(problem, walk.Offset() + tiling.lanes - 1) / 8);
    });
  });
}

// Bits of several bytes come together where rows were put together, and rows of bits are not the view's.
TEST(FoldedVectorsFindTheirBits) {
  int64_t folded = 0;
  ForSmallProblems(kProblems, kMostElements, [&](const Problem& drawn, Random* random) {
    const Problem problem = WithActivationBits(drawn);
    const cuda::View view = cuda::MakeView(problem, true, 1 << 30, /*fold_bits=*/true);
    if (!view.Folded()) return;
    ++folded;
    const cuda::Tiling tiling = cuda::MakeTiling(view, RandomBlock(view, /*has_bits=*/true, random), 1, false);
    std::vector<uint8_t> bytes(LayoutOfActivationBits(problem).Bytes());
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random->Below(256));
    ForVectors(tiling, tiling.steps, [&](const auto& walk, const Step&) {
      unsigned expected = 0;
      for (int lane = 0; lane < tiling.lanes; ++lane) {
        expected |= unsigned{Bit(bytes, BitOf(problem, walk.Offset() + lane))} << lane;
      }
      EXPECT_EQ(walk.LoadFoldedBits(tiling, bytes.data(), /*virtual_batch=*/0), expected);
    });
  });
  EXPECT_LT(100, folded);
}

}  // namespace
}  // namespace tfops
