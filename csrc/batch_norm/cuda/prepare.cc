// The process' memory of settings, choices and refusals; and the entry points that tell of them.

#include "csrc/batch_norm/cuda/prepare.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <utility>

namespace tfops::cuda {
namespace {

// Problems that are remembered. Where there are more, all are forgotten, and begin anew.
constexpr size_t kMostProblems = 4096;

using Key = std::array<int64_t, 5>;

thread_local int rehearsals = 0;

struct Memory {
  std::shared_mutex mutex;  // of all but `calls`
  Settings settings;
  Status environment = ReadEnvironment(&settings);
  std::map<Key, std::shared_ptr<const Prepared>> prepared;
  std::map<std::array<std::string, 3>, Refusal> refusals;  // by tier, pass and error
  std::atomic<int64_t> calls[std::size(kTiers)] = {};
};

Memory& TheMemory() {
  static Memory* const memory = new Memory;  // for calls that come while the process ends
  return *memory;
}

Key KeyOf(const Problem& problem, Pass pass, const Device& device) {
  constexpr int kMost = 64;
  static_assert(std::size(kActivations) <= kMost);
  int64_t flags = device.number;
  for (const int flag :
       {static_cast<int>(problem.dtype), static_cast<int>(problem.activation), static_cast<int>(pass)}) {
    flags = flags * kMost + flag;
  }
  for (const bool flag : {problem.has_residual, problem.training}) flags = flags * 2 + flag;
  return {problem.outer, problem.channels, problem.inner, problem.virtual_batches, flags};
}

const char* NameOf(Pass pass) { return pass == Pass::kForward ? "forward" : "backward"; }

Status Situate(const Problem& problem, Pass pass, bool aligned, const Device& device, Situation* situation) {
  situation->problem = problem;
  situation->pass = pass;
  situation->aligned = aligned;
  situation->device = device;
  if (situation->IsSinglePass()) return {};  // on no chip
  return DescribeOccupancy(device, problem.dtype, pass == Pass::kBackward, &situation->occupancy);
}

// Makes the situation for the entry points, whose arguments may be anything.
Status SituateChecked(const Problem& problem, bool backward, bool aligned, const Device& device, Situation* situation,
                      Settings* settings) {
  if (const Status status = Validate(problem); !status.ok()) return status;
  if (device.multiprocessors < 1) {
    return {StatusCode::kInvalidArgument,
            "multiprocessors must be > 0, but it is " + std::to_string(device.multiprocessors)};
  }
  {
    Memory& memory = TheMemory();
    const std::shared_lock<std::shared_mutex> lock(memory.mutex);
    if (!memory.environment.ok()) return memory.environment;
    *settings = memory.settings;
  }
  if (problem.Elements() == 0) return {};
  return Situate(problem, backward ? Pass::kBackward : Pass::kForward, aligned, device, situation);
}

Plan DescribePlan(const Situation& situation, const Choice& choice) {
  const auto batches = static_cast<int>(std::min(situation.problem.virtual_batches, kMostOfLaunch));
  const int merges = batches > 1 ? 1 : 0;
  Plan plan;
  plan.tier = NameOf(choice.tier);
  plan.reason = Explain(situation, choice);
  plan.nanoseconds = choice.nanoseconds;
  if (choice.tier == Tier::kStreaming) {
    const StreamingTiling tiling =
        MakeStreamingTiling(situation.problem, situation.aligned, situation.device.multiprocessors);
    plan.launches = situation.IsSinglePass() ? 1 : 3 + merges;
    plan.read_again = situation.IsSinglePass() ? 0 : 1;
    plan.lanes = tiling.lanes;
    plan.threads = tiling.block.x * tiling.block.y * tiling.block.z;
    plan.blocks = tiling.grid.x * tiling.grid.y * batches;
    plan.blocks_per_slab = tiling.grid.y;
    return plan;
  }
  plan.launches = 1 + merges;
  plan.lanes = choice.plan.lanes;
  plan.threads = choice.plan.threads;
  plan.blocks = static_cast<int>(choice.plan.Blocks()) * batches;
  plan.blocks_per_slab = choice.plan.group;
  plan.shared_bytes = choice.plan.shared_bytes;
  plan.read_again = choice.plan.ReadAgain();
  plan.waves = choice.waves;
  plan.index = choice.index;
  return plan;
}

Status MakePrepared(const Problem& problem, Pass pass, const Device& device, const Settings& settings,
                    Prepared* prepared) {
  for (const bool aligned : {false, true}) {
    Situation situation;
    if (const Status status = Situate(problem, pass, aligned, device, &situation); !status.ok()) return status;
    Choice& choice = prepared->choice[aligned];
    prepared->status[aligned] = ChooseTier(situation, settings, &choice);
    StreamingTiling& tiling = prepared->tiling[aligned];
    tiling = MakeStreamingTiling(problem, aligned, device.multiprocessors);
    prepared->items = std::max(
        {prepared->items, choice.plan.ExchangedItems(), tiling.Splits() * tiling.units * problem.virtual_batches});
  }
  return {};
}

std::string Text(const Problem& problem) {
  constexpr const char* kTypes[] = {"float16", "bfloat16", "float32", "float64"};
  return std::to_string(problem.outer) + " x " + std::to_string(problem.channels) + " channels x " +
         std::to_string(problem.inner) + " of " + kTypes[static_cast<int>(problem.dtype)] +
         (problem.virtual_batches > 1 ? ", " + std::to_string(problem.virtual_batches) + " virtual batches" : "");
}

}  // namespace

Status Prepare(const Problem& problem, Pass pass, const Device& device, std::shared_ptr<const Prepared>* prepared) {
  Memory& memory = TheMemory();
  const Key key = KeyOf(problem, pass, device);
  {
    const std::shared_lock<std::shared_mutex> lock(memory.mutex);
    if (const auto found = memory.prepared.find(key); found != memory.prepared.end()) {
      *prepared = found->second;
      return {};
    }
  }
  const std::unique_lock<std::shared_mutex> lock(memory.mutex);
  if (!memory.environment.ok()) return memory.environment;
  auto made = std::make_shared<Prepared>();
  if (const Status status = MakePrepared(problem, pass, device, memory.settings, made.get()); !status.ok()) {
    return status;
  }
  if (memory.prepared.size() >= kMostProblems) memory.prepared.clear();
  *prepared = memory.prepared.emplace(key, std::move(made)).first->second;
  return {};
}

void RememberRefusal(const Problem& problem, Pass pass, bool aligned, const Device& device, const std::string& error) {
  Memory& memory = TheMemory();
  const std::unique_lock<std::shared_mutex> lock(memory.mutex);
  const auto found = memory.prepared.find(KeyOf(problem, pass, device));
  if (found == memory.prepared.end()) return;  // whoever came in between has made all forgotten
  const Choice& refused = found->second->choice[aligned];
  if (refused.tier == Tier::kStreaming) return;  // another thread was first
  const std::string tier = NameOf(refused.tier);
  const auto [entry, is_new] =
      memory.refusals.try_emplace({tier, NameOf(pass), error}, Refusal{tier, NameOf(pass), error, Text(problem), 0});
  ++entry->second.count;
  if (is_new) {
    std::fprintf(
        stderr,
        "tfops: CUDA refused a launch of the tier %s (%s pass, %s): %s. %s; tfops_kernels.cuda_launches() counts.\n",
        tier.c_str(), NameOf(pass), Text(problem).c_str(), error.c_str(),
        refused.forced ? "It is forced" : "The streaming tier does this work from now on");
  }
  if (refused.forced) return;
  auto changed = std::make_shared<Prepared>(*found->second);
  changed->choice[aligned] = {};
  found->second = std::move(changed);
}

Rehearsal::Rehearsal() { ++rehearsals; }
Rehearsal::~Rehearsal() { --rehearsals; }
bool IsRehearsal() { return rehearsals > 0; }

void CountCall(Tier tier) {
  if (!IsRehearsal()) TheMemory().calls[static_cast<int>(tier)].fetch_add(1, std::memory_order_relaxed);
}

Launches GetLaunches() {
  Memory& memory = TheMemory();
  const std::shared_lock<std::shared_mutex> lock(memory.mutex);
  Launches launches;
  for (const Tier tier : kTiers) launches.calls[NameOf(tier)] = memory.calls[static_cast<int>(tier)];
  for (const auto& [key, refusal] : memory.refusals) launches.refusals.push_back(refusal);
  return launches;
}

void ResetLaunches() {
  Memory& memory = TheMemory();
  const std::unique_lock<std::shared_mutex> lock(memory.mutex);
  for (auto& count : memory.calls) count = 0;
  memory.refusals.clear();
}

PolicySettings GetPolicySettings() {
  Memory& memory = TheMemory();
  const std::shared_lock<std::shared_mutex> lock(memory.mutex);
  return ToPublic(memory.settings);
}

Status SetPolicySettings(const PolicySettings& settings) {
  Memory& memory = TheMemory();
  const std::unique_lock<std::shared_mutex> lock(memory.mutex);
  if (!memory.environment.ok()) return memory.environment;
  if (const Status status = Apply(settings, &memory.settings); !status.ok()) return status;
  memory.prepared.clear();
  return {};
}

Status DescribeOccupancy(const Device& device, DataType dtype, bool backward, Occupancy* occupancy) {
  if (device.number >= 0) {
    return AskOccupancy(device, dtype, backward ? Pass::kBackward : Pass::kForward, occupancy);
  }
  *occupancy = OccupancyOnPaper(device);
  return {};
}

Status MakePlan(const Problem& problem, bool backward, bool aligned, const Device& device, Plan* plan) {
  *plan = {};
  Situation situation;
  Settings settings;
  if (const Status status = SituateChecked(problem, backward, aligned, device, &situation, &settings); !status.ok()) {
    return status;
  }
  if (problem.Elements() == 0) {
    plan->tier = NameOf(Tier::kStreaming);
    plan->reason = "there are no elements";
    plan->launches = problem.channels > 0 && (backward || problem.training) ? 1 : 0;
    return {};
  }
  Choice choice;
  if (const Status status = ChooseTier(situation, settings, &choice); !status.ok()) return status;
  *plan = DescribePlan(situation, choice);
  return {};
}

Status ListPlans(const Problem& problem, bool backward, bool aligned, const Device& device, std::vector<Plan>* plans) {
  plans->clear();
  Situation situation;
  Settings settings;
  const Status status = SituateChecked(problem, backward, aligned, device, &situation, &settings);
  if (!status.ok() || problem.Elements() == 0) return status;
  for (const Choice& choice : BestChoices(situation, settings)) plans->push_back(DescribePlan(situation, choice));
  return {};
}

Status PlanTime(const Problem& problem, bool backward, bool aligned, const Device& device, int index,
                const std::map<std::string, double>& tuning, double* nanoseconds) {
  *nanoseconds = 0;
  Situation situation;
  Settings settings;
  if (const Status status = SituateChecked(problem, backward, aligned, device, &situation, &settings); !status.ok()) {
    return status;
  }
  if (const Status status = Apply(tuning, &settings.tuning); !status.ok()) return status;
  if (problem.Elements() > 0) *nanoseconds = TimeOfPlan(situation, index, settings);
  if (*nanoseconds > 0) return {};
  return {StatusCode::kInvalidArgument, "index must be that of a plan that fits, but it is " + std::to_string(index)};
}

}  // namespace tfops::cuda
