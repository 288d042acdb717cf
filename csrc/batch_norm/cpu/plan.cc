#include "csrc/batch_norm/cpu/plan.h"

#include <algorithm>
#include <numeric>

namespace tfops::cpu {
namespace {

constexpr int64_t kItemElements = 64 * 1024;  // fewer are not worth a task of their own
constexpr int64_t kMaxItems = 128;            // bounds the partial statistics; enough for as many threads

// Channels-last: a chunk's statistics are written and read once more, which costs as much as some rows of data. If they
// are few, rather that than too few chunks to share out.
constexpr int64_t kMinChunkRows = 128;
constexpr int64_t kFewChunks = 8;
constexpr int64_t kFewestChunkRows = 16;
constexpr int64_t kColumnBlock = 2048;  // whose coefficients stay in the first cache, nearly

constexpr int64_t kSegment = 16 * 1024;  // channels-first; a multiple of 8, for whole bytes of mask
constexpr int64_t kRunBytes = 4096;      // channels-first: what prefetching wants to see in one piece, a page
constexpr int64_t kMinColumns = 512;     // channels-last: fold until a row is as long
constexpr int64_t kMinFoldedRows = 8;    // fold only if that many rows remain

// What an item may read and find in its core's cache when it reads it again: half of the second level's usual MiB; or,
// where that is too little for one channel, a core's usual share of the third level's.
constexpr int64_t kItemBytes = 512 << 10;
constexpr int64_t kMaxItemBytes = 4 << 20;
constexpr int64_t kMinWholeItems = 16;  // so that threads have enough of them

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows to lay side by side. 1 where vectors are full anyway.
int64_t ChooseFold(int64_t rows, int64_t channels) {
  int64_t fold = kBlock / std::gcd(channels, kBlock);
  if (fold * channels > kMaxColumns || rows < kMinFoldedRows * fold) return 1;
  while (fold * channels < kMinColumns && rows >= kMinFoldedRows * 2 * fold) fold *= 2;
  return fold;
}

void PlanChannelsLast(const Problem& problem, int64_t wanted, Plan* plan) {
  const int64_t rows = problem.Count();
  plan->fold = ChooseFold(rows, problem.channels);
  plan->columns = plan->fold * problem.channels;
  plan->rows = rows / plan->fold;
  plan->tail = rows % plan->fold * problem.channels;
  plan->column_block = plan->fold > 1 ? plan->columns : std::min(plan->columns, kColumnBlock);
  plan->column_blocks = CeilDiv(plan->columns, plan->column_block);
  const int64_t most_chunks = std::max(plan->rows / kMinChunkRows, std::min(plan->rows / kFewestChunkRows, kFewChunks));
  plan->chunks = std::clamp<int64_t>(wanted / plan->column_blocks, 1, std::max<int64_t>(most_chunks, 1));
}

void PlanChannelsFirst(const Problem& problem, int64_t channel_bytes, bool needs_sums, int64_t wanted, Plan* plan) {
  plan->segment = std::min(problem.inner, kSegment);
  plan->segments_per_plane = CeilDiv(problem.inner, plan->segment);
  plan->rows = problem.outer * plan->segments_per_plane;
  const int64_t plane_bytes = channel_bytes / problem.outer;
  if (!needs_sums && plan->rows >= kMinWholeItems) {  // straight through memory
    plan->group = plan->column_block = plan->columns;
    plan->column_blocks = 1;
    plan->chunks = std::min(wanted, plan->rows);
    return;
  }
  plan->group = std::clamp<int64_t>(kRunBytes / plane_bytes, 1, kMaxGroup);
  const bool is_whole = wanted == 1 || (channel_bytes <= kMaxItemBytes && problem.channels >= kMinWholeItems);
  if (is_whole) {
    const int64_t fitting = std::max<int64_t>(kItemBytes / channel_bytes, 1);
    plan->column_block = std::min(fitting, CeilDiv(problem.channels, wanted));
    plan->chunks = 1;
  } else {
    plan->column_block = CeilDiv(plan->columns, wanted);
    plan->chunks = std::clamp<int64_t>(wanted / CeilDiv(plan->columns, plan->column_block), 1, plan->rows);
  }
  plan->column_blocks = CeilDiv(plan->columns, plan->column_block);
}

}  // namespace

int64_t ElementBytes(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat16:
    case DataType::kBFloat16:
      return 2;
    case DataType::kFloat32:
      return 4;
    case DataType::kFloat64:
      break;
  }
  return 8;
}

Plan MakePlan(const Problem& problem, bool backward) {
  Plan plan;
  plan.columns = problem.channels;
  if (problem.Elements() == 0) return plan;  // no items
  plan.channels_last = problem.inner == 1;
  const int64_t wanted = std::clamp<int64_t>(problem.Elements() / kItemElements, 1, kMaxItems);
  if (plan.channels_last) {
    PlanChannelsLast(problem, wanted, &plan);
  } else {
    const int64_t channel_bytes = (backward ? 2 : 1) * problem.Count() * ElementBytes(problem.dtype);
    PlanChannelsFirst(problem, channel_bytes, backward || problem.training, wanted, &plan);
  }
  return plan;
}

}  // namespace tfops::cpu
