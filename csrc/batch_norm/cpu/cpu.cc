// The CPU entry points: checks, the choice of an instruction set, and the order of the phases.

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cpu/kernels.h"
#include "csrc/batch_norm/cpu/partition.h"
#include "csrc/batch_norm/cpu/phases.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace tfops::cpu {
namespace {

struct Level {
  const char* name;
  const Kernels& (*kernels_of[4])();  // by DataType
  bool supported;

  const Kernels& KernelsFor(DataType dtype) const { return kernels_of[static_cast<int>(dtype)](); }
};

#define TFOPS_KERNELS(level)                                                      \
  {&level::KernelsOf<DataType::kFloat16>, &level::KernelsOf<DataType::kBFloat16>, \
   &level::KernelsOf<DataType::kFloat32>, &level::KernelsOf<DataType::kFloat64>}

#ifdef __x86_64__
// Not every compiler's __builtin_cpu_supports knows this one.
bool SupportsF16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

// Those that this build has, the best first. The portable build's last one runs wherever this library loads.
std::vector<Level> Levels() {
  std::vector<Level> levels;
#ifdef __x86_64__
  __builtin_cpu_init();
  [[maybe_unused]] const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                   __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && SupportsF16c();
  [[maybe_unused]] const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                                   __builtin_cpu_supports("avx512vl");
#endif
#ifdef TFOPS_HAS_x86_64_v4
  levels.push_back({"x86-64-v4", TFOPS_KERNELS(x86_64_v4), v4});
#endif
#ifdef TFOPS_HAS_x86_64_v3
  levels.push_back({"x86-64-v3", TFOPS_KERNELS(x86_64_v3), v3});
#endif
#ifdef TFOPS_HAS_x86_64_v2
  levels.push_back({"x86-64-v2", TFOPS_KERNELS(x86_64_v2), true});
#endif
#ifdef TFOPS_HAS_neon
  levels.push_back({"neon", TFOPS_KERNELS(neon), true});
#endif
#ifdef TFOPS_HAS_generic
  levels.push_back({"generic", TFOPS_KERNELS(generic), true});
#endif
  return levels;
}
#undef TFOPS_KERNELS

// Whether a core that reads and writes a dozen streams, each of them straight ahead, keeps up what it does in two or
// three. Intel's do better then (a Xeon with AVX-512); AMD's take up to 2.7 times as long (Zen 5).
bool FollowsManyStreams() {
#ifdef __x86_64__
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

struct Choice {
  Status status;
  Level level;
  bool many_streams = false;
};

Status NotAChoice(const char* variable, const std::string& value, const std::string& choices) {
  return {StatusCode::kInvalidArgument, std::string("the environment variable ") + variable + " is '" + value +
                                            "', but this machine and build have: " + choices};
}

// The value of an environment variable, or "" without one.
std::string Forced(const char* variable) {
  const char* value = std::getenv(variable);
  return value ? value : "";
}

Choice Choose() {
  constexpr char kLevel[] = "TFOPS_CPU", kStreams[] = "TFOPS_CPU_STREAMS";
  const std::vector<Level> levels = Levels();
  const std::string level_name = Forced(kLevel), streams = Forced(kStreams);
  Choice choice{{}, levels.back(), streams.empty() ? FollowsManyStreams() : streams == "many"};
  if (!streams.empty() && streams != "few" && streams != "many") {
    choice.status = NotAChoice(kStreams, streams, "few, many");
  }
  std::string built, supported;
  const auto add = [](const char* name, std::string* names) {
    *names += (names->empty() ? "" : ", ") + std::string(name);
  };
  for (const Level& level : levels) {
    add(level.name, &built);
    if (!level.supported) continue;
    if (level_name.empty() || level.name == level_name) {
      choice.level = level;
      return choice;
    }
    add(level.name, &supported);
  }
  if (supported.empty()) {
    choice.level.name = "none";
    choice.status = {StatusCode::kUnavailable, "this build of tfops has CPU kernels for " + built +
                                                   " alone (it was built with TFOPS_NATIVE=ON), which this processor "
                                                   "does not have; build it again here, or with TFOPS_NATIVE=OFF"};
  } else {
    choice.status = NotAChoice(kLevel, level_name, supported);
  }
  return choice;
}

const Choice& Chosen() {
  static const Choice choice = Choose();
  return choice;
}

// A single channel has no layout: it is one plane.
Problem Simplified(Problem problem) {
  if (problem.channels == 1) {
    problem.inner = problem.Count();
    problem.outer = 1;
  }
  return problem;
}

// Vectors are loaded whole, past the last column too.
int64_t PaddedColumns(const Partition& partition) { return partition.columns + kBlock; }

template <typename Job>
Partials TakePartials(const Job& job, Arena* arena) {
  const int64_t count = job.partition.chunks * job.partition.columns;
  return {arena->Take<double>(count), arena->Take<double>(count)};
}

void* TakeColumns(const Problem& problem, const Partition& partition, Arena* arena) {
  return problem.dtype == DataType::kFloat64 ? static_cast<void*>(arena->Take<double>(PaddedColumns(partition)))
                                             : static_cast<void*>(arena->Take<float>(PaddedColumns(partition)));
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
Traversal ChooseTraversal(const Problem& problem, const Partition& partition, const uint8_t* activation_bits,
                          int arrays, const std::vector<const void*>& streamed) {
  if (!partition.channels_last || (activation_bits && problem.channels % 8 != 0)) return Traversal::kNone;
  if (arrays == 1) return Traversal::kApart;
  if (!streamed.empty() || OutgrowsCache(problem, arrays)) {
    const auto begins_line = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kLineBytes == 0; };
    const bool whole_lines = std::all_of(streamed.begin(), streamed.end(), begins_line);
    return Chosen().many_streams && whole_lines ? Traversal::kStreamed : Traversal::kNone;
  }
  return arrays == 2 ? Traversal::kApart : Traversal::kNone;  // three are too many to be read in so many places
}

// How many elements ahead passes fetch what memory has. A core guesses by itself what comes, but not past the end of a
// page; and of what it sees coming, the more instructions a vector takes, the less.
//
// In the order of memory: what is read when some thousand cycles have passed.
int64_t NearAhead(const Problem& problem) { return (3 << 10) / ElementBytes(problem.dtype); }

// Channels-first, items of whole channels: the same place of the next image, where they jump to.
int64_t NextImage(const Problem& problem, const Partition& partition) {
  return partition.segments_per_plane == 1 ? problem.channels * problem.inner : NearAhead(problem);
}

void SetFetchDistances(ForwardJob* job) {
  const Problem& problem = job->problem;
  const bool is_straight = !job->partition.channels_last && !problem.training;  // nothing that a core would not guess
  const bool is_near = problem.training && job->partition.IsWhole();            // x is, since its moments were taken
  if (!is_straight && !is_near) job->x_ahead = NearAhead(problem);
  if (!is_straight && problem.has_residual) {
    job->residual_ahead = is_near ? NextImage(problem, job->partition) : NearAhead(problem);
  }
}

void SetFetchDistances(BackwardJob* job) {
  constexpr int64_t kMostStepBytes = 8 << 10;  // longer steps hide the jumps between them
  const Problem& problem = job->problem;
  const Partition& partition = job->partition;
  const bool is_whole = !partition.channels_last && partition.IsWhole();
  if (!is_whole) job->dx_ahead = NearAhead(problem);
  if (partition.channels_last && problem.activation != Activation::kNone) job->sums_ahead = NearAhead(problem);
  if (is_whole && partition.column_block * problem.inner * ElementBytes(problem.dtype) <= kMostStepBytes) {
    job->sums_ahead = NextImage(problem, partition);
  }
}

ForwardJob MakeForwardJob(const Problem& problem, const ForwardArrays& arrays, Arena* arena) {
  ForwardJob job;
  job.problem = Simplified(problem);
  job.arrays = arrays;
  job.partition = MakePartition(job.problem, /*backward=*/false);
  const bool in_place = arrays.y == arrays.x || arrays.y == arrays.residual;
  job.stream_y = !in_place && OutgrowsCache(problem, problem.has_residual ? 3 : 2);
  std::vector<const void*> streamed;
  if (job.stream_y) streamed.push_back(arrays.y);
  const int count = (in_place ? 1 : 2) + (problem.has_residual ? 1 : 0);
  job.traversal = ChooseTraversal(problem, job.partition, arrays.activation_bits, count, streamed);
  if (OutgrowsCache(problem, count)) SetFetchDistances(&job);
  if (problem.training) job.partials = TakePartials(job, arena);
  for (void** piece : {&job.coefficients.mean, &job.coefficients.slope, &job.coefficients.offset}) {
    *piece = TakeColumns(problem, job.partition, arena);
  }
  return job;
}

BackwardJob MakeBackwardJob(const Problem& problem, const BackwardArrays& arrays, Arena* arena) {
  BackwardJob job;
  job.problem = Simplified(problem);
  job.arrays = arrays;
  job.partition = MakePartition(job.problem, /*backward=*/true);
  job.stream_dresidual = arrays.dresidual && arrays.dresidual != arrays.dy && OutgrowsCache(problem, 4);
  job.stream_dx = arrays.dx != arrays.dy && OutgrowsCache(problem, arrays.dresidual ? 4 : 3);
  // Not where conversions and an activation's derivative leave no registers for the coefficients.
  const bool is_converted = ElementBytes(problem.dtype) == 2;
  const int count = (arrays.dx == arrays.dy ? 2 : 3) + (arrays.residual ? 1 : 0) + (arrays.dresidual ? 1 : 0);
  std::vector<const void*> streamed;
  if (job.stream_dx) streamed.push_back(arrays.dx);
  if (job.stream_dresidual) streamed.push_back(arrays.dresidual);
  if (!is_converted || problem.activation == Activation::kNone) {
    job.traversal = ChooseTraversal(problem, job.partition, arrays.activation_bits, count, streamed);
  }
  if (OutgrowsCache(problem, count)) SetFetchDistances(&job);
  job.partials = TakePartials(job, arena);
  for (void** piece : {&job.coefficients.mean, &job.coefficients.slope, &job.coefficients.offset,
                       &job.coefficients.tilt, &job.coefficients.shift}) {
    *piece = TakeColumns(problem, job.partition, arena);
  }
  return job;
}

MomentsJob MakeMomentsJob(Problem problem, const MomentsArrays& arrays, Arena* arena) {
  problem.training = true;  // that is, the partition is one for statistics
  MomentsJob job;
  job.arrays = arrays;
  ForwardJob& forward = job.forward;
  forward.problem = Simplified(problem);
  forward.partition = MakePartition(forward.problem, /*backward=*/false);
  forward.arrays.x = arrays.x;
  forward.partials = TakePartials(forward, arena);
  job.counts = arena->Take<double>(std::max<int64_t>(forward.partition.chunks, 1) * forward.partition.columns);
  return job;
}

Status Check(const Problem& problem) {
  const Status status = Validate(problem);
  return status.ok() ? Chosen().status : status;
}

// Threads whose help is worth asking for.
int64_t Helpers(const Problem& problem) {
  constexpr int64_t kElements = 64 * 1024;  // what a thread does while another wakes up
  return problem.Elements() / kElements;
}

// The phase that calls body(begin, end) for all channels, and the range that an item of a whole partition has.
template <typename Body>
Phase ForChannels(int64_t channels, const Body& body) {
  constexpr int64_t kChannels = 256;
  return {(channels + kChannels - 1) / kChannels,
          [channels, &body](int64_t i) { body(i * kChannels, std::min(channels, (i + 1) * kChannels)); }};
}

template <typename Body>
void ForChannelsOfItem(const Problem& problem, const Partition& partition, int64_t item, const Body& body) {
  if (partition.fold > 1) return body(0, problem.channels);
  body(partition.ColumnBegin(item), partition.ColumnEnd(item));
}

}  // namespace

size_t ForwardWorkspaceBytes(const Problem& problem) {
  Arena arena(nullptr);
  MakeForwardJob(problem, {}, &arena);
  return arena.used();
}

size_t BackwardWorkspaceBytes(const Problem& problem) {
  Arena arena(nullptr);
  MakeBackwardJob(problem, {}, &arena);
  return arena.used();
}

Status Forward(const Problem& problem, const ForwardArrays& arrays, void* workspace, const Threads& threads) {
  const Status status = Check(problem);
  if (!status.ok()) return status;
  Arena arena(workspace);
  const ForwardJob job = MakeForwardJob(problem, arrays, &arena);
  const Kernels& kernels = Chosen().level.KernelsFor(problem.dtype);
  const int64_t items = job.partition.Items();
  const auto moments = [&](int64_t i) { kernels.moments(job, i); };
  const auto finish = [&](int64_t begin, int64_t end) { kernels.finish_statistics(job, begin, end); };
  const auto normalize = [&](int64_t i) { kernels.normalize(job, i); };
  const auto all = [&](int64_t i) {
    kernels.moments(job, i);
    ForChannelsOfItem(job.problem, job.partition, i, finish);
    kernels.normalize(job, i);
  };
  std::vector<Phase> phases;
  if (problem.training && items > 0 && job.partition.IsWhole()) {
    phases = {{items, all}};
  } else if (problem.training) {
    phases = {{items, moments}, ForChannels(problem.channels, finish), {items, normalize, /*backwards=*/true}};
  } else {
    phases = {ForChannels(problem.channels, finish), {items, normalize}};
  }
  RunPhases(threads, Helpers(problem), std::move(phases));
  return {};
}

Status Backward(const Problem& problem, const BackwardArrays& arrays, void* workspace, const Threads& threads) {
  const Status status = Check(problem);
  if (!status.ok()) return status;
  Arena arena(workspace);
  const BackwardJob job = MakeBackwardJob(problem, arrays, &arena);
  const Kernels& kernels = Chosen().level.KernelsFor(problem.dtype);
  const int64_t items = job.partition.Items();
  const auto prepare = [&](int64_t begin, int64_t end) { kernels.prepare_gradient(job, begin, end); };
  const auto moments = [&](int64_t i) { kernels.gradient_moments(job, i); };
  const auto finish = [&](int64_t begin, int64_t end) { kernels.finish_gradient(job, begin, end); };
  const auto normalize = [&](int64_t i) { kernels.gradient_normalize(job, i); };
  const auto all = [&](int64_t i) {
    ForChannelsOfItem(job.problem, job.partition, i, prepare);
    kernels.gradient_moments(job, i);
    ForChannelsOfItem(job.problem, job.partition, i, finish);
    kernels.gradient_normalize(job, i);
  };
  std::vector<Phase> phases;
  if (items > 0 && job.partition.IsWhole()) {
    phases = {{items, all}};
  } else {
    phases = {ForChannels(problem.channels, prepare),
              {items, moments},
              ForChannels(problem.channels, finish),
              {items, normalize, /*backwards=*/true}};
  }
  RunPhases(threads, Helpers(problem), std::move(phases));
  return {};
}

size_t MomentsWorkspaceBytes(const Problem& problem) {
  Arena arena(nullptr);
  MakeMomentsJob(problem, {}, &arena);
  return arena.used();
}

Status BatchMoments(const Problem& problem, const MomentsArrays& arrays, void* workspace, const Threads& threads) {
  const Status status = Check(problem);
  if (!status.ok()) return status;
  Arena arena(workspace);
  const MomentsJob job = MakeMomentsJob(problem, arrays, &arena);
  const Kernels& kernels = Chosen().level.KernelsFor(problem.dtype);
  const auto moments = [&](int64_t i) {
    return arrays.mask.flags ? kernels.masked_moments(job, i) : kernels.moments(job.forward, i);
  };
  const auto finish = [&](int64_t begin, int64_t end) { kernels.finish_moments(job, begin, end); };
  RunPhases(threads, Helpers(problem),
            {{job.forward.partition.Items(), moments}, ForChannels(problem.channels, finish)});
  return {};
}

Status GradientMoments(const Problem& problem, const BackwardArrays& arrays, void* workspace, const Threads& threads) {
  const Status status = Check(problem);
  if (!status.ok()) return status;
  Arena arena(workspace);
  const BackwardJob job = MakeBackwardJob(problem, arrays, &arena);
  const Kernels& kernels = Chosen().level.KernelsFor(problem.dtype);
  const auto prepare = [&](int64_t begin, int64_t end) { kernels.prepare_gradient(job, begin, end); };
  const auto moments = [&](int64_t i) { kernels.gradient_moments(job, i); };
  const auto finish = [&](int64_t begin, int64_t end) { kernels.finish_gradient(job, begin, end); };
  RunPhases(threads, Helpers(problem),
            {ForChannels(problem.channels, prepare),
             {job.partition.Items(), moments},
             ForChannels(problem.channels, finish)});
  return {};
}

Status GradientNormalize(const Problem& problem, const BackwardArrays& arrays, const StatisticsGradient& statistics,
                         void* workspace, const Threads& threads) {
  const Status status = Check(problem);
  if (!status.ok()) return status;
  Arena arena(workspace);
  const BackwardJob job = MakeBackwardJob(problem, arrays, &arena);
  BackwardJob centered = job;
  centered.problem.training = true;  // that is, dx has terms of the statistics
  const Kernels& kernels = Chosen().level.KernelsFor(problem.dtype);
  const auto prepare = [&](int64_t begin, int64_t end) {
    kernels.prepare_gradient(job, begin, end);
    kernels.spread_statistics_gradient(job, statistics, begin, end);
  };
  const auto normalize = [&](int64_t i) {
    if (statistics.mask.flags) return kernels.masked_gradient_normalize(job, statistics.mask, i);
    kernels.gradient_normalize(centered, i);
  };
  RunPhases(threads, Helpers(problem), {ForChannels(problem.channels, prepare), {job.partition.Items(), normalize}});
  return {};
}

const char* InstructionSet() { return Chosen().level.name; }

}  // namespace tfops::cpu
