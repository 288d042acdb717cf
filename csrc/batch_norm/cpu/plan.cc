#include "csrc/batch_norm/cpu/plan.h"

#include <algorithm>
#include <numeric>

namespace tfops::cpu {
namespace {

constexpr int64_t kItemElements = 32 * 1024;  // fewer are not worth a task of their own
constexpr int64_t kMaxItems = 128;            // bounds the partial statistics; enough for as many threads
constexpr int64_t kColumnBlock = 512;         // channels-last: a run of 1 to 4 KiB in each row
constexpr int64_t kSegment = 16 * 1024;       // channels-first; a multiple of 8, for whole bytes of mask
constexpr int64_t kMinColumns = 128;          // channels-last: fold until a row is as long
constexpr int64_t kMaxFoldedChannels = 256;   // from here on the part-empty vector at a row's end is small change
constexpr int64_t kMinFoldedRows = 8;         // fold only if that many rows remain

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t ChooseFold(int64_t rows, int64_t channels) {
  if (channels >= kMaxFoldedChannels) return 1;
  int64_t fold = kBlock / std::gcd(channels, kBlock);
  while (fold * channels < kMinColumns) fold *= 2;
  return rows >= kMinFoldedRows * fold ? fold : 1;
}

}  // namespace

Plan MakePlan(const Problem& problem) {
  Plan plan;
  plan.columns = problem.channels;
  if (problem.Elements() == 0) return plan;  // no items
  plan.channels_last = problem.inner == 1;
  const int64_t wanted = std::clamp<int64_t>(problem.Elements() / kItemElements, 1, kMaxItems);
  if (plan.channels_last) {
    const int64_t rows = problem.Count();
    plan.fold = ChooseFold(rows, problem.channels);
    plan.columns = plan.fold * problem.channels;
    plan.rows = rows / plan.fold;
    plan.tail = rows % plan.fold * problem.channels;
    // Folded rows stay whole, for the sake of the mask: its rows are those of the data, not of the matrix.
    plan.column_block = plan.fold > 1 ? plan.columns : std::min(plan.columns, kColumnBlock);
    plan.column_blocks = CeilDiv(plan.columns, plan.column_block);
  } else {
    plan.segment = std::min(problem.inner, kSegment);
    plan.segments_per_plane = CeilDiv(problem.inner, plan.segment);
    plan.rows = problem.outer * plan.segments_per_plane;
    plan.column_block = CeilDiv(plan.columns, wanted);
    plan.column_blocks = CeilDiv(plan.columns, plan.column_block);
  }
  plan.chunks = std::clamp<int64_t>(wanted / plan.column_blocks, 1, plan.rows);
  return plan;
}

}  // namespace tfops::cpu
