#include "csrc/batch_norm/cpu/partition.h"

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

constexpr int64_t kMinColumns = 512;   // channels-last: fold until a row is as long
constexpr int64_t kMinFoldedRows = 8;  // fold only if that many rows remain

constexpr int64_t kSegment = 16 * 1024;   // channels-first; a multiple of 8, for whole bytes of mask
constexpr int64_t kMinStraightRows = 16;  // fewer are not enough items; channels are shared out then

// Channels-first: what an item of whole channels may read and find in its core's second-level cache when it reads it
// again, half of the usual MiB; a single channel may be larger, and comes from the third level's usual share of a core.
constexpr int64_t kItemBytes = 512 << 10;
constexpr int64_t kMaxChannelBytes = 4 << 20;
constexpr int64_t kMinWholeChannels = 16;  // so that threads have enough items
// Such items go through memory in steps, from image to image: each lands on pages that the core has no address of yet
// and nothing has been prefetched from. If less than kStepBytes lie there, it takes less time to read everything twice
// in its order, if the third level has it (kCacheBytes: what that usually has); or less than kStepBytesOfTwo, if a
// residual is to be read in steps too.
constexpr int64_t kStepBytes = 10 << 10;
constexpr int64_t kStepBytesOfTwo = 5 << 10;
constexpr int64_t kCacheBytes = 32 << 20;
// In its order: groups of channels of so many bytes; and elements of a channel that are worth the end of its sums.
constexpr int64_t kGroupBytes = 64 << 10;
constexpr int64_t kMinChunkElements = 2048;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows to lay side by side. 1 where vectors are full anyway.
int64_t ChooseFold(int64_t rows, int64_t channels) {
  int64_t fold = kBlock / std::gcd(channels, kBlock);
  if (fold * channels > kMaxColumns || rows < kMinFoldedRows * fold) return 1;
  while (fold * channels < kMinColumns && rows >= kMinFoldedRows * 2 * fold) fold *= 2;
  return fold;
}

void PartitionChannelsLast(const Problem& problem, int64_t wanted, Partition* partition) {
  const int64_t rows = problem.Count();
  partition->fold = ChooseFold(rows, problem.channels);
  partition->columns = partition->fold * problem.channels;
  partition->rows = rows / partition->fold;
  partition->tail = rows % partition->fold * problem.channels;
  partition->column_block = partition->fold > 1 ? partition->columns : std::min(partition->columns, kColumnBlock);
  partition->column_blocks = CeilDiv(partition->columns, partition->column_block);
  const int64_t most_chunks =
      std::max(partition->rows / kMinChunkRows, std::min(partition->rows / kFewestChunkRows, kFewChunks));
  partition->chunks = std::clamp<int64_t>(wanted / partition->column_blocks, 1, std::max<int64_t>(most_chunks, 1));
}

// Whether items are to have all elements of their channels, step_bytes of them in one piece.
bool AreItemsWhole(const Problem& problem, bool backward, int64_t channel_bytes, int64_t step_bytes) {
  if (channel_bytes > kMaxChannelBytes || problem.channels < kMinWholeChannels) return false;
  if (step_bytes >= kStepBytes) return true;
  const int64_t tensors = (backward ? 3 : 2) + (problem.has_residual ? 1 : 0);
  const bool are_cached = tensors * problem.Elements() * ElementBytes(problem.dtype) <= kCacheBytes;
  const bool reads_residual = problem.has_residual && !backward;
  return !are_cached && (!reads_residual || step_bytes >= kStepBytesOfTwo);
}

void PartitionChannelsFirst(const Problem& problem, bool backward, int64_t wanted, Partition* partition) {
  const int64_t plane_bytes = problem.inner * ElementBytes(problem.dtype);
  partition->segment = std::min(problem.inner, kSegment);
  partition->segments_per_plane = CeilDiv(problem.inner, partition->segment);
  partition->rows = problem.outer * partition->segments_per_plane;
  if (!backward && !problem.training && partition->rows >= kMinStraightRows) {  // no sums: straight through memory
    partition->group = partition->column_block = partition->columns;
    partition->column_blocks = 1;
    partition->chunks = std::min(wanted, partition->rows);
    return;
  }
  partition->group = std::clamp<int64_t>(kGroupBytes / plane_bytes, 1, kMaxGroup);
  const int64_t channel_bytes = (backward ? 2 : 1) * problem.outer * plane_bytes;
  const int64_t fitting = std::max<int64_t>(kItemBytes / channel_bytes, 1);
  partition->column_block = std::min(fitting, CeilDiv(partition->columns, wanted));
  partition->chunks = 1;
  if (wanted > 1 && !AreItemsWhole(problem, backward, channel_bytes, partition->column_block * plane_bytes)) {
    const int64_t most_chunks = std::min(partition->rows / kRunsAtOnce, problem.Count() / kMinChunkElements);
    const int64_t rows = CeilDiv(partition->rows, std::clamp<int64_t>(most_chunks, 1, wanted));
    partition->chunks = std::max<int64_t>(partition->rows / (CeilDiv(rows, kRunsAtOnce) * kRunsAtOnce), 1);
    partition->column_block =
        std::max(partition->group, CeilDiv(partition->columns, CeilDiv(wanted, partition->chunks)));
  }
  partition->column_blocks = CeilDiv(partition->columns, partition->column_block);
}

}  // namespace

Partition MakePartition(const Problem& problem, bool backward, bool has_rows) {
  Partition partition;
  partition.columns = problem.channels;
  if (problem.Elements() == 0) return partition;  // no items
  partition.channels_last = problem.inner == 1 && has_rows;
  const int64_t wanted = std::clamp<int64_t>(problem.Elements() / kItemElements, 1, kMaxItems);
  if (partition.channels_last) {
    PartitionChannelsLast(problem, wanted, &partition);
  } else {
    PartitionChannelsFirst(problem, backward, wanted, &partition);
  }
  return partition;
}

}  // namespace tfops::cpu
