// The CPU entry points: checks, and the order of the phases.

#include <algorithm>
#include <cstdio>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cpu/instruction_set.h"
#include "csrc/batch_norm/cpu/jobs.h"
#include "csrc/batch_norm/cpu/kernels.h"
#include "csrc/batch_norm/cpu/phases.h"
#include "csrc/batch_norm/in_place.h"

namespace tfops::cpu {
namespace {

// A part of a pass: what the kernels do to an item, or to the channels from `begin` to `end`.
template <typename Job>
struct Step {
  using OfItem = void (Kernels::*)(const Job& job, int64_t item) const;
  using OfChannels = void (Kernels::*)(const Job& job, int64_t begin, int64_t end) const;

  Step(OfItem of_item) : of_item(of_item) {}                  // NOLINT: lists of steps convert
  Step(OfChannels of_channels) : of_channels(of_channels) {}  // NOLINT

  OfItem of_item = nullptr;
  OfChannels of_channels = nullptr;
};

// A phase of so many items in each of the virtual batches, in which body(job, item) is called with the job of one.
template <typename Job, typename Body>
Phase ForVirtualBatches(const Job& job, int64_t items, const Body& body) {
  if (job.whole.virtual_batches == 1) return {items, [&job, body](int64_t i) { body(job, i); }};
  return {items * job.whole.virtual_batches, [&job, items, body](int64_t i) {
            const int64_t k = i / items;
            body(OfVirtualBatch(job, k), i - k * items);
          }};
}

// All of the steps, for one item after the other: each has all elements of its channels.
template <typename Job>
Phase AllInOne(const Job& job, const Kernels& kernels, const std::vector<Step<Job>>& steps) {
  return ForVirtualBatches(job, job.partition.Items(), [&kernels, steps](const Job& job, int64_t item) {
    const Partition& partition = job.partition;
    const bool all = partition.fold > 1;  // columns of all channels
    const int64_t begin = all ? 0 : partition.ColumnBegin(item);
    const int64_t end = all ? job.problem.channels : partition.ColumnEnd(item);
    for (const Step<Job>& step : steps) {
      step.of_item ? (kernels.*step.of_item)(job, item) : (kernels.*step.of_channels)(job, begin, end);
    }
  });
}

constexpr int64_t kChannels = 256;  // that are finished at once

int64_t ChannelItems(int64_t channels) { return (channels + kChannels - 1) / kChannels; }

template <typename Job>
void FinishChannels(const Job& job, const Kernels& kernels, const Step<Job>& step, int64_t i) {
  const int64_t end = std::min(job.problem.channels, (i + 1) * kChannels);
  (kernels.*step.of_channels)(job, i * kChannels, end);
}

template <typename Job>
Phase OneByOne(const Job& job, const Kernels& kernels, const Step<Job>& step) {
  if (step.of_item) {
    return ForVirtualBatches(job, job.partition.Items(),
                             [&kernels, step](const Job& job, int64_t i) { (kernels.*step.of_item)(job, i); });
  }
  return ForVirtualBatches(job, ChannelItems(job.problem.channels),
                           [&kernels, step](const Job& job, int64_t i) { FinishChannels(job, kernels, step, i); });
}

// Runs the steps in their order, each after the one before it is done for all that it depends on.
template <typename Job>
void Run(const Job& job, const std::vector<Step<Job>>& steps, const Threads& threads) {
  constexpr int64_t kElements = 64 * 1024;  // what a thread does while another wakes up
  const Kernels& kernels = ChosenInstructionSet().KernelsFor(job.problem.dtype);
  std::vector<Phase> phases;
  if (job.partition.Items() > 0 && job.partition.IsWhole()) {
    phases.push_back(AllInOne(job, kernels, steps));
  } else {
    bool again = false;  // an item that has been seen: the last of them are in the cache
    for (const Step<Job>& step : steps) {
      phases.push_back(OneByOne(job, kernels, step));
      phases.back().backwards = step.of_item && again;
      again = again || step.of_item;
    }
  }
  if (job.whole.virtual_batches != 1) {
    const Step<Job> merge(&Kernels::MergeVirtualBatches);
    phases.push_back({ChannelItems(job.problem.channels),
                      [&job, &kernels, merge](int64_t i) { FinishChannels(job, kernels, merge, i); }});
  }
  RunPhases(threads, job.whole.Elements() / kElements, std::move(phases));
}

// InvalidArgument if there is a channel whose x the gradient could not compute from y.
template <typename P>
Status CheckInvertible(const Problem& problem, const ForwardArrays& arrays) {
  const P* scale = static_cast<const P*>(arrays.scale);
  const P* offset = static_cast<const P*>(arrays.offset);
  for (int64_t c = 0; c < problem.channels; ++c) {
    if (!IsScaleTooSmall(RoundingOf(problem), scale[c], offset[c])) continue;
    const auto shown = [](P value) {
      char text[32];
      std::snprintf(text, sizeof(text), "%g", static_cast<double>(value));
      return std::string(text);
    };
    return {StatusCode::kInvalidArgument, "scale is too near 0 for in_place, which computes x from y: in channel " +
                                              std::to_string(c) + " it is " + shown(scale[c]) + ", and offset is " +
                                              shown(offset[c])};
  }
  return {};
}

// The bytes that make_job(arena) takes of a workspace.
template <typename MakeJob>
size_t WorkspaceBytes(const MakeJob& make_job) {
  Arena arena(nullptr);
  make_job(&arena);
  return arena.used();
}

// Checks a problem, and runs the steps on make_job(arena).
template <typename MakeJob, typename Job = std::invoke_result_t<MakeJob, Arena*>>
Status CheckAndRun(const Problem& problem, void* workspace, const Threads& threads, const MakeJob& make_job,
                   const std::vector<Step<Job>>& steps) {
  Status status = Validate(problem);
  if (status.ok()) status = ChosenInstructionSet().status;
  if (!status.ok()) return status;
  Arena arena(workspace);
  Run(make_job(&arena), steps, threads);
  return status;
}

}  // namespace

size_t ForwardWorkspaceBytes(const Problem& problem) {
  return WorkspaceBytes([&](Arena* arena) { return MakeForwardJob(problem, {}, arena); });
}

size_t BackwardWorkspaceBytes(const Problem& problem) {
  return WorkspaceBytes([&](Arena* arena) { return MakeBackwardJob(problem, {}, arena); });
}

size_t MomentsWorkspaceBytes(const Problem& problem) {
  static const uint8_t flag = 1;
  MomentsArrays of_rows, of_elements;  // the mask, which is not known here
  of_elements.mask = {&flag, /*length=*/1};
  return std::max(WorkspaceBytes([&](Arena* arena) { return MakeMomentsJob(problem, of_rows, arena); }),
                  WorkspaceBytes([&](Arena* arena) { return MakeMomentsJob(problem, of_elements, arena); }));
}

Status Forward(const Problem& problem, const ForwardArrays& arrays, void* workspace, const Threads& threads) {
  if (problem.in_place) {
    const Status status = problem.dtype == DataType::kFloat64 ? CheckInvertible<double>(problem, arrays)
                                                              : CheckInvertible<float>(problem, arrays);
    if (!status.ok()) return status;
  }
  std::vector<Step<ForwardJob>> steps = {&Kernels::FinishStatistics, &Kernels::Normalize};
  if (problem.training) steps.insert(steps.begin(), &Kernels::Moments);
  return CheckAndRun(
      problem, workspace, threads, [&](Arena* arena) { return MakeForwardJob(problem, arrays, arena); }, steps);
}

Status Backward(const Problem& problem, const BackwardArrays& arrays, void* workspace, const Threads& threads) {
  return CheckAndRun(
      problem, workspace, threads, [&](Arena* arena) { return MakeBackwardJob(problem, arrays, arena); },
      {&Kernels::PrepareGradient, &Kernels::GradientMoments, &Kernels::FinishGradient, &Kernels::GradientNormalize});
}

Status BatchMoments(const Problem& problem, const MomentsArrays& arrays, void* workspace, const Threads& threads) {
  if (const Status status = ValidateMoments(problem); !status.ok()) return status;
  return CheckAndRun(problem, workspace, threads, [&](Arena* arena) { return MakeMomentsJob(problem, arrays, arena); },
                     {&Kernels::Moments, &Kernels::FinishMoments});
}

Status GradientMoments(const Problem& problem, const BackwardArrays& arrays, void* workspace, const Threads& threads) {
  return CheckAndRun(problem, workspace, threads, [&](Arena* arena) { return MakeBackwardJob(problem, arrays, arena); },
                     {&Kernels::PrepareGradient, &Kernels::GradientMoments, &Kernels::FinishGradient});
}

Status GradientNormalize(const Problem& problem, const BackwardArrays& arrays, const StatisticsGradient& statistics,
                         void* workspace, const Threads& threads) {
  const auto make_job = [&](Arena* arena) {
    BackwardJob job = MakeBackwardJob(problem, arrays, arena);
    job.statistics = statistics;
    job.mask = statistics.mask;
    job.has_statistics_terms = true;
    return job;
  };
  return CheckAndRun(problem, workspace, threads, make_job,
                     {&Kernels::PrepareGradient, &Kernels::TakeStatisticsGradient, &Kernels::GradientNormalize});
}

}  // namespace tfops::cpu
