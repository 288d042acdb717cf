#include "csrc/batch_norm/cpu/jobs.h"

#include <algorithm>
#include <fstream>
#include <thread>
#include <vector>

#include "csrc/batch_norm/cpu/instruction_set.h"
#include "csrc/batch_norm/virtual_batches.h"

namespace tfops::cpu {
namespace {

// The problem of a virtual batch, in which a single channel has no layout: it is one plane.
Problem Simplified(Problem problem) {
  problem = OfVirtualBatch(problem);
  if (problem.channels == 1) {
    problem.inner = problem.Count();
    problem.outer = 1;
  }
  return problem;
}

void TakePartials(Job* job, bool counts, Arena* arena) {
  job->partials_apart = std::max<int64_t>(job->partition.chunks, 1) * job->partition.columns;
  const int64_t count = job->partials_apart * job->whole.virtual_batches;
  job->partials = {arena->Take<double>(count), arena->Take<double>(count),
                   counts ? arena->Take<double>(count) : nullptr};
}

// Gives the first `count` coefficients their places.
void TakeCoefficients(Job* job, int count, Arena* arena) {
  // Vectors are loaded whole, past the last column too.
  job->coefficients_apart = (job->partition.columns + 2 * kBlock - 1) / kBlock * kBlock;
  const int64_t size = job->coefficients_apart * job->whole.virtual_batches;
  for (int k = 0; k < count; ++k) {
    job->coefficients[k] = job->problem.dtype == DataType::kFloat64 ? static_cast<void*>(arena->Take<double>(size))
                                                                    : static_cast<void*>(arena->Take<float>(size));
  }
}

// The last-level cache that a core shares, or as much of it as is likely to be ours: a virtual machine of few cores
// sees all of its host's, and finds the others' data in it. (sysconf adds up those of the whole machine, and errs in
// virtual ones.)
int64_t LastLevelCacheBytes() {
  static const int64_t bytes = [] {
    constexpr int64_t kUsual = 32 << 20, kMostPerCore = 16 << 20;
    int64_t kibibytes = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kibibytes;
    const int64_t cores = std::max(std::thread::hardware_concurrency(), 1u);
    return std::min(kibibytes > 0 ? kibibytes << 10 : kUsual, cores * kMostPerCore);
  }();
  return bytes;
}

// Whether as many tensors of x's size are more than the cache holds: then an output written through it would only push
// out what is still to be read. Not so an output in an input's place, whose lines have just been read. Nothing but
// speed depends on it.
bool OutgrowsCache(const Problem& problem, int tensors) {
  return problem.Elements() > LastLevelCacheBytes() / (tensors * ElementBytes(problem.dtype));
}

// How to go through the rows of so many arrays, some of which are written past the cache. For tiles, rows, and those of
// the activation bits if there are any, have to follow one another. Four streams of a single array in place are as good
// for memory as for the cache; of more arrays, not everywhere.
Traversal ChooseTraversal(const Problem& problem, const Job& job, bool bits, int arrays,
                          const std::vector<const void*>& streamed) {
  if (!job.partition.channels_last || (bits && job.problem.channels % 8 != 0)) return Traversal::kRows;
  if (arrays == 1) return Traversal::kTiles;
  if (!streamed.empty() || OutgrowsCache(problem, arrays)) {
    const auto begins_line = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kLineBytes == 0; };
    const bool have_lines =
        job.whole.virtual_batches == 1 || job.problem.Elements() * ElementBytes(problem.dtype) % kLineBytes == 0;
    const bool whole_lines = have_lines && std::all_of(streamed.begin(), streamed.end(), begins_line);
    return ChosenInstructionSet().many_streams && whole_lines ? Traversal::kStreamedTiles : Traversal::kRows;
  }
  return arrays == 2 ? Traversal::kTiles : Traversal::kRows;  // three are too many to be read in so many places
}

// How many elements ahead passes fetch what memory has. A core guesses by itself what comes, but not past the end of a
// page; and of what it sees coming, the more instructions a vector takes, the less.
//
// In the order of memory: what is read when some thousand cycles have passed.
int64_t NearAhead(const Problem& problem) { return (3 << 10) / ElementBytes(problem.dtype); }

// Channels-first, items of whole channels: the same place of the next image, where they jump to.
int64_t NextImage(const Job& job) {
  return job.partition.segments_per_plane == 1 ? job.problem.channels * job.problem.inner : NearAhead(job.problem);
}

void SetFetchDistances(ForwardJob* job) {
  const Problem& problem = job->problem;
  // Planes in the order of memory are nothing that a core would not guess, but where conversions take long.
  const bool is_straight = !job->partition.channels_last && !problem.training && ElementBytes(problem.dtype) > 2;
  const bool is_near = problem.training && job->partition.IsWhole();  // x is, since its moments were taken
  if (!is_straight && !is_near) job->x_ahead = NearAhead(problem);
  if (!is_straight && problem.has_residual) job->residual_ahead = is_near ? NextImage(*job) : NearAhead(problem);
}

void SetFetchDistances(BackwardJob* job) {
  constexpr int64_t kMostStepBytes = 8 << 10;  // longer steps hide the jumps between them
  const Problem& problem = job->problem;
  const Partition& partition = job->partition;
  const bool is_whole = !partition.channels_last && partition.IsWhole();
  if (!is_whole) job->dx_ahead = NearAhead(problem);
  if (partition.channels_last && problem.activation != Activation::kNone) job->sums_ahead = NearAhead(problem);
  if (is_whole && partition.column_block * problem.inner * ElementBytes(problem.dtype) <= kMostStepBytes) {
    job->sums_ahead = NextImage(*job);
  }
}

}  // namespace

ForwardJob MakeForwardJob(const Problem& problem, const ForwardArrays& arrays, Arena* arena) {
  ForwardJob job;
  job.whole = problem;
  job.problem = Simplified(problem);
  job.arrays = arrays;
  job.partition = MakePartition(job.problem, /*backward=*/false);
  const bool in_place = arrays.y == arrays.x || arrays.y == arrays.residual;
  job.stream_y = !in_place && OutgrowsCache(problem, problem.has_residual ? 3 : 2);
  std::vector<const void*> streamed;
  if (job.stream_y) streamed.push_back(arrays.y);
  const int count = (in_place ? 1 : 2) + (problem.has_residual ? 1 : 0);
  job.traversal = ChooseTraversal(problem, job, arrays.activation_bits, count, streamed);
  if (OutgrowsCache(problem, count)) SetFetchDistances(&job);
  if (problem.training) TakePartials(&job, /*counts=*/false, arena);
  TakeCoefficients(&job, kCoefficientsOfZ, arena);
  return job;
}

BackwardJob MakeBackwardJob(const Problem& problem, const BackwardArrays& arrays, Arena* arena) {
  BackwardJob job;
  job.whole = problem;
  job.problem = Simplified(problem);
  job.arrays = arrays;
  job.has_statistics_terms = problem.training;
  job.partition = MakePartition(job.problem, /*backward=*/true);
  job.stream_dresidual = arrays.dresidual && arrays.dresidual != arrays.dy && OutgrowsCache(problem, 4);
  job.stream_dx = arrays.dx != arrays.dy && OutgrowsCache(problem, arrays.dresidual ? 4 : 3);
  // No tiles where conversions and an activation's derivative leave no registers for the coefficients.
  const bool is_converted = ElementBytes(problem.dtype) == 2;
  const int count = (arrays.dx == arrays.dy ? 2 : 3) + (arrays.residual ? 1 : 0) + (arrays.dresidual ? 1 : 0);
  std::vector<const void*> streamed;
  if (job.stream_dx) streamed.push_back(arrays.dx);
  if (job.stream_dresidual) streamed.push_back(arrays.dresidual);
  if ((!is_converted || problem.activation == Activation::kNone) && !problem.in_place) {
    job.traversal = ChooseTraversal(problem, job, arrays.activation_bits, count, streamed);
  }
  if (OutgrowsCache(problem, count)) SetFetchDistances(&job);
  TakePartials(&job, /*counts=*/false, arena);
  TakeCoefficients(&job, kCoefficients, arena);
  return job;
}

ForwardJob MakeMomentsJob(const Problem& problem, const MomentsArrays& arrays, Arena* arena) {
  ForwardJob job;
  job.whole = problem;
  job.problem = Simplified(problem);
  job.problem.training = true;  // so that the partition is one for statistics
  // A mask of rows is gone through row by row, any other element by element.
  const bool has_rows = !arrays.mask.flags || arrays.mask.length == problem.channels;
  job.partition = MakePartition(job.problem, /*backward=*/false, has_rows);
  job.arrays.x = arrays.x;
  job.moments = arrays;
  job.mask = arrays.mask;
  TakePartials(&job, /*counts=*/true, arena);
  return job;
}

namespace {

template <typename AnyJob>
AnyJob Moved(const AnyJob& job, int64_t k) {
  AnyJob moved = job;
  moved.arrays = OfVirtualBatch(job.problem, job.arrays, k);
  MoveOn(k * job.partials_apart * static_cast<int64_t>(sizeof(double)), &moved.partials.first, &moved.partials.second);
  for (void*& each : moved.coefficients) MoveOn(k * job.coefficients_apart * ParamBytes(job.problem.dtype), &each);
  return moved;
}

}  // namespace

ForwardJob OfVirtualBatch(const ForwardJob& job, int64_t k) { return Moved(job, k); }
BackwardJob OfVirtualBatch(const BackwardJob& job, int64_t k) { return Moved(job, k); }

}  // namespace tfops::cpu
