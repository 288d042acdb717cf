// The CPU entry points: checks, the choice of an instruction set, and the order of the phases.

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cpu/kernels.h"
#include "csrc/batch_norm/cpu/plan.h"

namespace tfops::cpu {
namespace {

struct Level {
  const char* name;
  const Kernels& (*kernels_for)(DataType dtype);
  bool supported;
};

// The best first. The last one runs wherever this library loads.
std::vector<Level> Levels() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return {{"x86-64-v4", &x86_64_v4::KernelsFor, v4},
          {"x86-64-v3", &x86_64_v3::KernelsFor, v3},
          {"x86-64-v2", &x86_64_v2::KernelsFor, true}};
#else
  return {{"generic", &generic::KernelsFor, true}};
#endif
}

struct Choice {
  Status status;
  Level level;
};

Choice ChooseLevel() {
  const std::vector<Level> levels = Levels();
  const char* forced = std::getenv("TFOPS_CPU");
  std::string supported;
  for (const Level& level : levels) {
    if (!level.supported) continue;
    if (!forced || !*forced || level.name == std::string(forced)) return {{}, level};
    supported += (supported.empty() ? "" : ", ") + std::string(level.name);
  }
  return {{StatusCode::kInvalidArgument, "the environment variable TFOPS_CPU is '" + std::string(forced) +
                                             "', but this machine and build have: " + supported},
          levels.back()};
}

const Choice& Chosen() {
  static const Choice choice = ChooseLevel();
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
int64_t PaddedColumns(const Plan& plan) { return plan.columns + kBlock; }

template <typename Job>
Partials TakePartials(const Job& job, Arena* arena) {
  const int64_t count = job.plan.chunks * job.plan.columns;
  return {arena->Take<double>(count), arena->Take<double>(count)};
}

void* TakeColumns(const Problem& problem, const Plan& plan, Arena* arena) {
  return problem.dtype == DataType::kFloat64 ? static_cast<void*>(arena->Take<double>(PaddedColumns(plan)))
                                             : static_cast<void*>(arena->Take<float>(PaddedColumns(plan)));
}

ForwardJob MakeForwardJob(const Problem& problem, const ForwardArrays& arrays, Arena* arena) {
  ForwardJob job{Simplified(problem), {}, arrays, {}, {}};
  job.plan = MakePlan(job.problem);
  if (problem.training) job.partials = TakePartials(job, arena);
  for (void** piece : {&job.coefficients.mean, &job.coefficients.slope, &job.coefficients.offset}) {
    *piece = TakeColumns(problem, job.plan, arena);
  }
  return job;
}

BackwardJob MakeBackwardJob(const Problem& problem, const BackwardArrays& arrays, Arena* arena) {
  BackwardJob job{Simplified(problem), {}, arrays, {}, {}};
  job.plan = MakePlan(job.problem);
  job.partials = TakePartials(job, arena);
  for (void** piece : {&job.coefficients.mean, &job.coefficients.slope, &job.coefficients.offset,
                       &job.coefficients.tilt, &job.coefficients.shift}) {
    *piece = TakeColumns(problem, job.plan, arena);
  }
  return job;
}

// Runs body(begin, end) over the channels, in parallel where there are many.
template <typename Body>
void ForChannels(int64_t channels, const ParallelFor& parallel_for, const Body& body) {
  constexpr int64_t kChannels = 1024;
  if (channels <= kChannels) return body(0, channels);
  parallel_for((channels + kChannels - 1) / kChannels,
               [&](int64_t i) { body(i * kChannels, std::min(channels, (i + 1) * kChannels)); });
}

template <typename Body>
void ForItems(int64_t items, const ParallelFor& parallel_for, const Body& body) {
  if (items == 1) return body(0);
  if (items > 1) parallel_for(items, body);
}

Status Check(const Problem& problem) {
  const Status status = Validate(problem);
  return status.ok() ? Chosen().status : status;
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

Status Forward(const Problem& problem, const ForwardArrays& arrays, void* workspace, const ParallelFor& parallel_for) {
  const Status status = Check(problem);
  if (!status.ok()) return status;
  Arena arena(workspace);
  const ForwardJob job = MakeForwardJob(problem, arrays, &arena);
  const Kernels& kernels = Chosen().level.kernels_for(problem.dtype);
  const int64_t items = job.plan.Items();
  if (problem.training) ForItems(items, parallel_for, [&](int64_t i) { kernels.moments(job, i); });
  ForChannels(problem.channels, parallel_for,
              [&](int64_t begin, int64_t end) { kernels.finish_statistics(job, begin, end); });
  ForItems(items, parallel_for, [&](int64_t i) { kernels.normalize(job, items - 1 - i); });
  return {};
}

Status Backward(const Problem& problem, const BackwardArrays& arrays, void* workspace,
                const ParallelFor& parallel_for) {
  const Status status = Check(problem);
  if (!status.ok()) return status;
  Arena arena(workspace);
  const BackwardJob job = MakeBackwardJob(problem, arrays, &arena);
  const Kernels& kernels = Chosen().level.kernels_for(problem.dtype);
  const int64_t items = job.plan.Items();
  ForChannels(problem.channels, parallel_for,
              [&](int64_t begin, int64_t end) { kernels.prepare_gradient(job, begin, end); });
  ForItems(items, parallel_for, [&](int64_t i) { kernels.gradient_moments(job, i); });
  ForChannels(problem.channels, parallel_for,
              [&](int64_t begin, int64_t end) { kernels.finish_gradient(job, begin, end); });
  ForItems(items, parallel_for, [&](int64_t i) { kernels.gradient_normalize(job, items - 1 - i); });
  return {};
}

const char* InstructionSet() { return Chosen().level.name; }

}  // namespace tfops::cpu
