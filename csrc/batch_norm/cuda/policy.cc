// The plans that there are, how long each takes, and the choice.

#include "csrc/batch_norm/cuda/policy.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <numeric>
#include <utility>

#include "csrc/batch_norm/cuda/streaming.h"
#include "csrc/batch_norm/cuda/tuning.h"

namespace tfops::cuda {
namespace {

constexpr Tier kTiers[] = {Tier::kOneBlock, Tier::kCluster, Tier::kGrid, Tier::kStreaming};
constexpr int kRegisters = 64 << 10;      // of a multiprocessor
constexpr int kRegistersPerThread = 128;  // that the kernels have at most
constexpr int kReserved = 1 << 10;        // of each block's shared memory, by CUDA

int64_t RoundUp(int64_t n, int64_t unit) { return DivideUp(n, unit) * unit; }

// Bytes that a pass reads and writes, of tensors.
struct Traffic {
  double statistics = 0;  // read for sums
  double rest = 0;        // read for the result alone
  double written = 0;
};

Traffic TrafficOf(const Problem& problem, Pass pass) {
  const double tensor = static_cast<double>(problem.Elements()) * SizeOf(problem.dtype);
  const double mask = NeedsMask(problem) ? static_cast<double>(LayoutOfMask(problem).Bytes()) : 0;
  if (pass == Pass::kForward) return {tensor, problem.has_residual ? tensor : 0, tensor + mask};
  const bool dresidual = problem.has_residual && problem.activation != Activation::kNone;
  return {(2 + NeedsResidual(problem)) * tensor + mask, 0, (1 + dresidual) * tensor};
}

double StreamingTime(const Problem& problem, Pass pass, const Device& device) {
  using Reckon = PolicyTuning;
  const Traffic traffic = TrafficOf(problem, pass);
  const double rate = Reckon::kMemoryRate * device.multiprocessors;
  if (pass == Pass::kForward && !problem.training) {
    return Reckon::kLaunch + 2 * Reckon::kPhase + (traffic.statistics + traffic.rest + traffic.written) / rate;
  }
  const bool cached = traffic.statistics <= Reckon::kCacheShare * static_cast<double>(device.l2_bytes);
  const double again = traffic.statistics * (cached ? Reckon::kCacheFactor : 1);
  return Reckon::kLaunch + 2 * Reckon::kNextLaunch + 4 * Reckon::kPhase + 2 * Reckon::kMerge +
         (traffic.statistics + again + traffic.rest + traffic.written) / rate;
}

// The blocks of a plan that a multiprocessor holds at once.
int64_t BlocksAtOnce(const OnChip& plan, const Device& device) {
  const int64_t by_registers = kRegisters / (kRegistersPerThread * plan.threads);
  return std::min(by_registers, device.shared_bytes_per_multiprocessor / (plan.shared_bytes + kReserved));
}

// Vectors that a thread has in flight.
int Batch(Pass pass, int lanes) {
  const auto of = [pass](auto batch) { return pass == Pass::kForward ? batch.kForward : 2 * batch.kBackward; };
  switch (lanes) {
    case 1:
      return of(OnChipBatch<1>());
    case 2:
      return of(OnChipBatch<2>());
    case 4:
      return of(OnChipBatch<4>());
    default:
      return of(OnChipBatch<8>());
  }
}

double OnChipTime(const Problem& problem, Pass pass, const OnChip& plan, const Device& device) {
  using Reckon = PolicyTuning;
  const Traffic traffic = TrafficOf(problem, pass);
  const double bytes = traffic.statistics + traffic.rest + traffic.written;
  // The busiest multiprocessor takes so many blocks, each of so many steps, of which some vectors may be past an edge.
  const double tensor = static_cast<double>(problem.Elements()) * SizeOf(problem.dtype);
  const double block_bytes = static_cast<double>(plan.held_steps) * plan.block.x * plan.block.y * plan.block.z *
                             plan.lanes * SizeOf(problem.dtype) * (bytes / tensor);
  const int64_t at_once = BlocksAtOnce(plan, device);
  // A cluster is within one of the parts that a GPU consists of, of 16 multiprocessors or so.
  const int64_t usable = plan.group > 1 && plan.scope == Scope::kCluster
                             ? device.multiprocessors * at_once / plan.group * plan.group
                             : device.multiprocessors * at_once;
  const double waves = static_cast<double>(DivideUp(plan.Blocks(), std::max<int64_t>(usable, 1)));
  const double busiest = static_cast<double>(DivideUp(plan.Blocks(), device.multiprocessors));
  // Neighbours in memory that a block reads: short runs waste memory's bursts.
  const double run = plan.planes       ? static_cast<double>(plan.inner) * plan.block.y
                     : plan.slabs == 1 ? static_cast<double>(plan.units) * plan.block.z
                                       : static_cast<double>(plan.slots);
  const double run_bytes = run * SizeOf(problem.dtype);
  const double efficiency = run_bytes >= 128 ? 1 : run_bytes >= 64 ? 0.9 : run_bytes >= 32 ? 0.7 : 0.4;
  // What a multiprocessor has in flight at once limits its rate.
  const int batch = Batch(pass, plan.lanes);
  const double resident = std::min(static_cast<double>(at_once), busiest);
  const double in_flight = resident * plan.threads * batch * plan.lanes * SizeOf(problem.dtype);
  const double own_rate = std::min(Reckon::kOwnRate, in_flight / Reckon::kLatency);
  const double moving =
      std::max(bytes / (Reckon::kMemoryRate * device.multiprocessors), busiest * block_bytes / own_rate) / efficiency;
  double meeting = 0;
  if (plan.group > 1) {
    meeting = plan.scope == Scope::kCluster ? Reckon::kClusterBarrier : Reckon::kGridBarrier;
    meeting += plan.group * Reckon::kMergeBlock;
  }
  const double extra_phase = problem.has_residual && !plan.holds_residual ? Reckon::kPhase : 0;
  return Reckon::kLaunch + waves * (2 * Reckon::kPhase + Reckon::kMerge + meeting + extra_phase) + moving;
}

// --- The plans ----------------------------------------------------------------------------------------------------

// Calls body(block) for the ways in which `threads` threads can share a slab.
template <typename Body>
void ForRows(const View& view, bool mask, int64_t size, int threads, const Body& body) {
  const int64_t vectors = DivideUp(view.units, view.lanes);
  // A slab has whole channels, and threads that share a byte of the mask are neighbours in a warp.
  int64_t unit = mask ? 8 / view.lanes : 1;
  if (view.repeat > 1) unit = vectors;
  if (view.repeat == 1 && view.pixels > 1) unit = view.pixels / std::gcd(view.pixels, view.lanes);
  int64_t last = 0;
  for (const int bytes : {32, 64, 128, 256, 512, 1024, 2048, 4096, 8192}) {
    const int64_t wanted = std::max<int64_t>(bytes / (view.lanes * size), 1);
    const int64_t slabs = std::max<int64_t>(DivideUp(vectors, RoundUp(wanted, unit)), 1);
    const int64_t x = RoundUp(DivideUp(vectors, slabs), unit);
    if (x > threads || x * view.lanes / view.UnitsPerChannel() > threads) return;
    if (x == last) continue;
    last = x;
    Extent block;
    block.x = static_cast<int>(x);
    block.z = static_cast<int>(std::min<int64_t>(threads / x, view.outer));
    body(block);
  }
}

template <typename Body>
void ForPlanes(const View& view, bool mask, int threads, const Body& body) {
  const int64_t vectors = DivideUp(view.inner, view.lanes);
  const int64_t unit = mask ? 8 / view.lanes : 1;
  for (const int y : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64}) {
    if (y > 1 && y > view.units) return;
    const int64_t most = threads / y / unit * unit;
    if (most == 0) return;
    // As wide as leaves few threads without work.
    Extent best;
    double most_used = 0;
    const int64_t least_across = DivideUp(vectors, most);
    for (int64_t across = least_across; across < least_across + 8; ++across) {
      Extent block;
      block.x = static_cast<int>(RoundUp(DivideUp(vectors, across), unit));
      block.y = y;
      block.z = static_cast<int>(std::min<int64_t>(threads / (block.x * y), view.outer));
      const double used = static_cast<double>(vectors) * block.z * y / static_cast<double>(across * threads);
      if (used > most_used * 1.03) {
        most_used = used;
        best = block;
      }
    }
    body(best);
  }
}

// Calls body(plan) for every plan, whether it fits or not.
template <typename Body>
void ForAllPlans(const Problem& problem, Pass pass, bool aligned, const Device& device, const Body& body) {
  const int64_t size = SizeOf(problem.dtype);
  const bool mask = NeedsMask(problem);
  View view = MakeView(problem, aligned, int64_t{1} << 30, true);
  if (view.repeat > 1 && view.units / view.lanes > OnChipTuning::kThreads) {
    view = MakeView(problem, aligned, 0, true);
  }
  if (view.pixels / std::gcd(view.pixels, view.lanes) > OnChipTuning::kThreads) {
    view = MakeView(problem, aligned, 0, true);
  }
  for (const int threads : {OnChipTuning::kThreads / 2, OnChipTuning::kThreads}) {
    const auto with_groups = [&](const Extent& block) {
      OnChip plan;
      static_cast<Tiling&>(plan) = MakeTiling(view, block);
      plan.threads = threads;
      const auto with_group = [&](Scope scope, int64_t group) {
        plan.scope = scope;
        plan.group = static_cast<int>(group);
        LayOut(problem, pass, device.shared_bytes_per_block, &plan);
        body(plan);
      };
      with_group(Scope::kBlock, 1);
      const int64_t most = std::min<int64_t>({device.largest_cluster, device.multiprocessors, plan.steps});
      for (int group = 2; group <= most; group *= 2) with_group(Scope::kCluster, group);
      const int64_t share = std::min<int64_t>(device.multiprocessors / plan.slabs, plan.steps);
      if (device.cooperative && share > 1) with_group(Scope::kGrid, share);
    };
    if (view.planes) {
      ForPlanes(view, mask, threads, with_groups);
    } else {
      ForRows(view, mask, size, threads, with_groups);
    }
  }
}

Tier TierOf(const OnChip& plan) {
  switch (plan.scope) {
    case Scope::kBlock:
      return Tier::kOneBlock;
    case Scope::kCluster:
      return Tier::kCluster;
    case Scope::kGrid:
      break;
  }
  return Tier::kGrid;
}

std::string Kilobytes(int64_t bytes) { return std::to_string((bytes + 1023) / 1024) + " KB"; }

std::string Microseconds(double nanoseconds) {
  const int tenths = static_cast<int>(std::min(nanoseconds / 100 + 0.5, 2e9));
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " us";
}

Status ForcedTier(bool* forced, Tier* tier) {
  const char* const name = std::getenv("TFOPS_TIER");
  *forced = name && *name;
  if (!*forced) return {};
  for (const Tier candidate : kTiers) {
    *tier = candidate;
    if (std::string(name) == NameOf(candidate)) return {};
  }
  return {StatusCode::kInvalidArgument,
          "TFOPS_TIER must be one_block, cluster, grid or streaming, but it is " + std::string(name)};
}

Status Choose(const Problem& problem, Pass pass, bool aligned, const Device& device, bool forced, Tier forced_tier,
              Choice* choice) {
  *choice = {};
  choice->forced = forced;
  const double streaming = StreamingTime(problem, pass, device);
  choice->nanoseconds = streaming;
  if (pass == Pass::kForward && !problem.training) return {};
  if (choice->forced && forced_tier == Tier::kStreaming) return {};

  bool found = false;
  int64_t least_shared = INT64_MAX;
  ForAllPlans(problem, pass, aligned, device, [&](const OnChip& plan) {
    if (choice->forced && TierOf(plan) != forced_tier) return;
    least_shared = std::min<int64_t>(least_shared, plan.shared_bytes);
    if (plan.shared_bytes > device.shared_bytes_per_block || plan.Blocks() > INT32_MAX) return;
    if (plan.scope == Scope::kGrid && plan.Blocks() > BlocksAtOnce(plan, device) * device.multiprocessors) return;
    choice->any_fits = true;
    const double time = OnChipTime(problem, pass, plan, device);
    const bool better = choice->forced ? !found || time < choice->nanoseconds : time < choice->nanoseconds;
    if (!better) {
      // The best of another tier is what the reason tells of.
      if (TierOf(plan) != choice->tier && (choice->next_nanoseconds == 0 || time < choice->next_nanoseconds)) {
        choice->next = TierOf(plan);
        choice->next_nanoseconds = time;
      }
      return;
    }
    if (TierOf(plan) != choice->tier && !choice->forced) {
      choice->next = choice->tier;
      choice->next_nanoseconds = choice->nanoseconds;
    }
    found = true;
    choice->tier = TierOf(plan);
    choice->plan = plan;
    choice->nanoseconds = time;
  });
  if (!choice->forced || found) return {};

  const std::string cannot = "TFOPS_TIER=" + std::string(NameOf(forced_tier)) + " cannot be had: ";
  const auto refuse = [&cannot](const std::string& why) { return Status{StatusCode::kInvalidArgument, cannot + why}; };
  if (forced_tier == Tier::kCluster && device.largest_cluster < 2) {
    return refuse("a GPU of compute capability " + std::to_string(device.compute_capability / 10) + "." +
                  std::to_string(device.compute_capability % 10) + " has no clusters");
  }
  if (forced_tier == Tier::kGrid && !device.cooperative) return refuse("this GPU has no cooperative launches");
  if (least_shared == INT64_MAX) return refuse("there is no work for a second block");
  return refuse("a block would have to keep " + Kilobytes(least_shared) + " on the chip, and has at most " +
                Kilobytes(device.shared_bytes_per_block));
}

}  // namespace

const char* NameOf(Tier tier) {
  switch (tier) {
    case Tier::kOneBlock:
      return "one_block";
    case Tier::kCluster:
      return "cluster";
    case Tier::kGrid:
      return "grid";
    case Tier::kStreaming:
      break;
  }
  return "streaming";
}

Status ChooseTier(const Problem& problem, Pass pass, bool aligned, const Device& device, Choice* choice) {
  bool forced = false;
  Tier tier = Tier::kStreaming;
  if (const Status status = ForcedTier(&forced, &tier); !status.ok()) return status;
  return Choose(problem, pass, aligned, device, forced, tier, choice);
}

Status RecallTier(const Problem& problem, Pass pass, bool aligned, const Device& device, int number, Choice* choice) {
  bool forced = false;
  Tier tier = Tier::kStreaming;
  if (const Status status = ForcedTier(&forced, &tier); !status.ok()) return status;
  constexpr size_t kMost = 1024;
  static thread_local std::map<std::array<int64_t, 4>, std::pair<Status, Choice>> remembered;
  int64_t flags = number;
  for (const int flag : {static_cast<int>(tier), static_cast<int>(problem.dtype), static_cast<int>(problem.activation),
                         static_cast<int>(pass)}) {
    flags = flags * 8 + flag;
  }
  for (const bool flag : {forced, aligned, problem.has_residual, problem.training}) flags = flags * 2 + flag;
  const std::array<int64_t, 4> key = {problem.outer, problem.channels, problem.inner, flags};
  if (const auto found = remembered.find(key); found != remembered.end()) {
    *choice = found->second.second;
    return found->second.first;
  }
  const Status status = Choose(problem, pass, aligned, device, forced, tier, choice);
  if (remembered.size() >= kMost) remembered.clear();
  remembered.emplace(key, std::make_pair(status, *choice));
  return status;
}

std::string Explain(const Problem& problem, Pass pass, const Choice& choice) {
  if (pass == Pass::kForward && !problem.training) return "inference takes a single pass, with nothing to keep";
  const OnChip& plan = choice.plan;
  std::string what;
  if (choice.tier == Tier::kStreaming) {
    what = "two passes over memory";
  } else {
    what = std::to_string(plan.slabs) + (plan.slabs == 1 ? " slab of " : " slabs of ") +
           std::to_string(plan.slab_channels) + (plan.slab_channels == 1 ? " channel, " : " channels, ") +
           std::to_string(plan.group) + (plan.group == 1 ? " block each, " : " blocks each, ") +
           Kilobytes(plan.shared_bytes) + " a block";
  }
  if (choice.forced) return what + ": TFOPS_TIER says so";
  if (choice.tier == Tier::kStreaming && !choice.any_fits) return what + ": the data do not fit on the chip";
  what += ": about " + Microseconds(choice.nanoseconds);
  if (choice.next_nanoseconds > 0) {
    what += ", against " + Microseconds(choice.next_nanoseconds) + " of " + NameOf(choice.next);
  }
  return what;
}

Status MakePlan(const Problem& problem, bool backward, bool aligned, const Device& device, Plan* plan) {
  *plan = {};
  if (const Status status = Validate(problem); !status.ok()) return status;
  if (device.multiprocessors < 1) {
    return {StatusCode::kInvalidArgument,
            "multiprocessors must be > 0, but it is " + std::to_string(device.multiprocessors)};
  }
  const Pass pass = backward ? Pass::kBackward : Pass::kForward;
  if (problem.Elements() == 0) {
    plan->tier = NameOf(Tier::kStreaming);
    plan->reason = "there are no elements";
    plan->launches = problem.channels > 0 && (backward || problem.training) ? 1 : 0;
    return {};
  }
  Choice choice;
  if (const Status status = ChooseTier(problem, pass, aligned, device, &choice); !status.ok()) return status;
  plan->tier = NameOf(choice.tier);
  plan->reason = Explain(problem, pass, choice);
  if (choice.tier == Tier::kStreaming) {
    const StreamingTiling tiling = MakeStreamingTiling(problem, aligned, device.multiprocessors);
    plan->launches = pass == Pass::kForward && !problem.training ? 1 : 3;
    plan->lanes = tiling.lanes;
    plan->threads = tiling.block.x * tiling.block.y * tiling.block.z;
    plan->blocks = tiling.grid.x * tiling.grid.y;
    plan->blocks_per_slab = tiling.grid.y;
    return {};
  }
  plan->launches = 1;
  plan->lanes = choice.plan.lanes;
  plan->threads = choice.plan.threads;
  plan->blocks = static_cast<int>(choice.plan.Blocks());
  plan->blocks_per_slab = choice.plan.group;
  plan->shared_bytes = choice.plan.shared_bytes;
  return {};
}

}  // namespace tfops::cuda
