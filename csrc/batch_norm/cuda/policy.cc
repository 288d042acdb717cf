// The plans that there are, how long each takes, and the choice.

#include "csrc/batch_norm/cuda/policy.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "csrc/batch_norm/cuda/streaming.h"

namespace tfops::cuda {
namespace {

constexpr int kReserved = 1 << 10;  // of each block's shared memory, by CUDA, from 8.0 on

// Clusters of 2, 4, 8 and 16 blocks, each with a multiprocessor to itself, that a whole H100 runs at once. A cluster is
// within one of the parts that a GPU consists of, whose sizes differ from chip to chip. No GPU was asked for these.
constexpr int kPaperMultiprocessors = 132;
constexpr int kPaperClusters[] = {66, 31, 15, 7};

int64_t RoundUp(int64_t n, int64_t unit) { return DivideUp(n, unit) * unit; }

// Bytes that a pass reads and writes, of tensors.
struct Traffic {
  double statistics = 0;  // read for sums
  double rest = 0;        // read for the result alone
  double written = 0;
};

Traffic TrafficOf(const Problem& problem, Pass pass) {
  const double tensor = static_cast<double>(problem.Elements()) * ElementBytes(problem.dtype);
  const double bits = NeedsActivationBits(problem) ? static_cast<double>(LayoutOfActivationBits(problem).Bytes()) : 0;
  if (pass == Pass::kForward) return {tensor, problem.has_residual ? tensor : 0, tensor + bits};
  const bool dresidual = problem.has_residual && problem.activation != Activation::kNone;
  return {(2 + NeedsResidual(problem)) * tensor + bits, 0, (1 + dresidual) * tensor};
}

// Of what virtual batches come to, by one more kernel.
double MergeTime(const Problem& problem, const PolicyTuning& reckon) {
  return problem.virtual_batches > 1 ? reckon.next_launch + 2 * reckon.phase : 0;
}

double StreamingTime(const Situation& situation, const PolicyTuning& reckon) {
  const auto& [problem, pass, aligned, device, occupancy] = situation;
  const Traffic traffic = TrafficOf(problem, pass);
  const double rate = reckon.memory_rate * device.multiprocessors;
  if (situation.IsSinglePass()) {
    return reckon.launch + 2 * reckon.phase + (traffic.statistics + traffic.rest + traffic.written) / rate;
  }
  const bool cached = traffic.statistics <= reckon.cache_share * static_cast<double>(device.l2_bytes);
  const double again = traffic.statistics * (cached ? reckon.cache_factor : 1);
  return reckon.launch + 2 * reckon.next_launch + 4 * reckon.phase + 2 * reckon.merge + MergeTime(problem, reckon) +
         (traffic.statistics + again + traffic.rest + traffic.written) / rate;
}

// How many blocks of a plan run at the same time: none where it does not fit. Some multiprocessors remain without work
// where blocks form clusters.
int64_t AtOnce(const OnChip& plan, const Occupancy& occupancy) {
  if (plan.shared_bytes > occupancy.room) return 0;
  if (plan.scope != Scope::kCluster) return occupancy.blocks;
  const int* const size = std::find(std::begin(Occupancy::kClusters), std::end(Occupancy::kClusters), plan.group);
  return int64_t{occupancy.clusters[size - std::begin(Occupancy::kClusters)]} * plan.group;
}

struct Estimate {
  double nanoseconds = 0;
  int waves = 1;
};

Estimate OnChipTime(const Situation& situation, const OnChip& plan, const PolicyTuning& reckon) {
  const auto& [problem, pass, aligned, device, occupancy] = situation;
  const Traffic traffic = TrafficOf(problem, pass);
  const int64_t at_once = AtOnce(plan, occupancy);
  // What is read again, L2 still has if it is not too much, of all blocks that run at the same time.
  const double again = traffic.statistics * plan.ReadAgain();
  const int64_t blocks = plan.Blocks() * problem.virtual_batches;
  const double of_running = std::min(1.0, static_cast<double>(at_once) / static_cast<double>(blocks));
  const bool cached = again * of_running <= reckon.cache_share * static_cast<double>(device.l2_bytes);
  const double twice = again * (cached ? 1 + reckon.cache_factor : 2);  // of what is read again, both times
  const double once = traffic.statistics - again + traffic.rest + traffic.written;
  // The busiest multiprocessor takes so many blocks, each of so many steps, of which some vectors may be past an edge.
  const double block_elements =
      static_cast<double>(plan.share_steps) * plan.block.x * plan.block.y * plan.block.z * plan.lanes;
  const double of_block = block_elements / static_cast<double>(problem.Elements());
  const double waves = static_cast<double>(DivideUp(blocks, at_once));
  // Neighbours in memory that a block reads: short runs waste memory's bursts.
  const double run = plan.planes       ? static_cast<double>(plan.inner) * plan.block.y
                     : plan.slabs == 1 ? static_cast<double>(plan.units) * plan.block.z
                                       : static_cast<double>(plan.sums.units);
  const double run_bytes = run * ElementBytes(problem.dtype);
  const double efficiency = run_bytes >= 128 ? 1 : run_bytes >= 64 ? 0.9 : run_bytes >= 32 ? 0.7 : 0.4;
  // What a multiprocessor has in flight at once limits its rate: of what is kept, all is asked for at once.
  const int arrays = pass == Pass::kForward ? 1 + plan.keeps_residual : 2 + NeedsResidual(problem);
  const double step_bytes = static_cast<double>(plan.threads) * arrays * plan.lanes * ElementBytes(problem.dtype);
  const auto rate = [&](int steps) {
    return std::min(reckon.own_rate, std::min(steps, plan.share_steps) * step_bytes / reckon.latency);
  };
  const double of_busiest = waves * of_block *
                            (once / rate(plan.register_steps + plan.shared_steps + OnChipTuning::kInFlight) +
                             twice / rate(OnChipTuning::kInFlight));
  const double moving =
      std::max((once + twice) / (reckon.memory_rate * device.multiprocessors), of_busiest) / efficiency;
  double meeting = 0;
  if (plan.group > 1) {
    meeting = 2 * (plan.scope == Scope::kCluster ? reckon.cluster_barrier : reckon.grid_barrier);
    meeting += plan.group * reckon.merge_block;
  }
  const double extra_phase = problem.has_residual && !plan.keeps_residual && pass == Pass::kForward ? reckon.phase : 0;
  return {reckon.launch + waves * (2 * reckon.phase + reckon.merge + meeting + extra_phase) + moving +
              MergeTime(problem, reckon),
          static_cast<int>(waves)};
}

// --- The plans ----------------------------------------------------------------------------------------------------

constexpr int kThreads = OnChipTuning::kThreads;

// Calls body(block) for the ways in which the threads of a block can share a slab.
template <typename Body>
void ForRows(const View& view, bool has_bits, int64_t size, const Body& body) {
  const int64_t vectors = DivideUp(view.units, view.lanes);
  // A slab has whole channels, and threads that share a byte of activation bits are neighbours in a warp.
  int64_t unit = has_bits ? 8 / view.lanes : 1;
  if (view.repeat > 1) unit = vectors;
  if (view.repeat == 1 && view.pixels > 1) unit = view.pixels / std::gcd(view.pixels, view.lanes);
  const int64_t most = kThreads / unit * unit;
  if (most == 0) return;
  int64_t last = 0;
  for (const int bytes : {32, 64, 128, 256, 512, 1024, 2048, 4096}) {
    const int64_t wanted = std::max<int64_t>(bytes / (view.lanes * size), 1);
    const int64_t slabs = DivideUp(vectors, std::min(RoundUp(wanted, unit), most));
    const int64_t x = RoundUp(DivideUp(vectors, slabs), unit);
    if (x == last) continue;
    last = x;
    Extent block;
    block.x = static_cast<int>(x);
    block.z = static_cast<int>(std::min<int64_t>(kThreads / x, view.outer));
    body(block);
  }
}

template <typename Body>
void ForPlanes(const View& view, bool has_bits, const Body& body) {
  const int64_t vectors = DivideUp(view.inner, view.lanes);
  const int64_t unit = has_bits ? 8 / view.lanes : 1;
  for (const int y : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64}) {
    if (y > 1 && y > view.units) return;
    const int64_t most = kThreads / y / unit * unit;
    if (most == 0) return;
    // The block is as wide as leaves few threads without work.
    Extent best;
    double most_used = 0;
    const int64_t least_across = DivideUp(vectors, most);
    for (int64_t across = least_across; across < least_across + 8; ++across) {
      Extent block;
      block.x = static_cast<int>(RoundUp(DivideUp(vectors, across), unit));
      block.y = y;
      block.z = static_cast<int>(std::min<int64_t>(kThreads / (block.x * y), view.outer));
      const double used = static_cast<double>(vectors) * block.z * y / static_cast<double>(across * kThreads);
      if (used > most_used * 1.03) {
        most_used = used;
        best = block;
      }
    }
    body(best);
  }
}

// Calls body(plan, index) for every plan, whether it fits or not.
template <typename Body>
void ForAllPlans(const Situation& situation, const Settings& settings, const Body& body) {
  const Problem& problem = situation.problem;
  const Device& device = situation.device;
  const View view = OnChipView(problem, situation.aligned);
  if (view.lanes == 1) return;  // single elements are streamed
  int index = 0;
  const auto with_groups = [&](const Extent& block) {
    OnChip plan;
    static_cast<Tiling&>(plan) = MakeTiling(view, block, kThreads, /*by_channel=*/true);
    plan.threads = kThreads;
    const auto with_group = [&](Scope scope, int64_t group) {
      plan.scope = scope;
      plan.group = static_cast<int>(group);
      LayOut(problem, situation.pass, situation.occupancy.room, &plan);
      body(plan, index++);
    };
    with_group(Scope::kBlock, 1);
    for (const int group : Occupancy::kClusters) {
      if (group <= device.largest_cluster && group <= plan.steps) with_group(Scope::kCluster, group);
    }
    const int64_t share =
        std::min<int64_t>((device.multiprocessors - settings.free_multiprocessors) / plan.slabs, plan.steps);
    if (device.cooperative && share > 1 && problem.virtual_batches == 1) with_group(Scope::kGrid, share);
  };
  if (view.planes) {
    ForPlanes(view, NeedsActivationBits(problem), with_groups);
  } else {
    ForRows(view, NeedsActivationBits(problem), ElementBytes(problem.dtype), with_groups);
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

bool Fits(const Situation& situation, const Settings& settings, const OnChip& plan) {
  const int64_t at_once = AtOnce(plan, situation.occupancy);
  if (at_once == 0 || plan.Blocks() > INT32_MAX) return false;
  if (situation.problem.virtual_batches > kMostOfLaunch) return false;
  return plan.scope != Scope::kGrid || plan.Blocks() <= at_once - settings.free_multiprocessors;
}

// Calls body(choice) for every plan that fits.
template <typename Body>
void ForChoices(const Situation& situation, const Settings& settings, const Body& body) {
  if (situation.IsSinglePass()) return;
  ForAllPlans(situation, settings, [&](const OnChip& plan, int index) {
    if (!Fits(situation, settings, plan)) return;
    const Estimate estimate = OnChipTime(situation, plan, settings.tuning);
    Choice choice;
    choice.tier = TierOf(plan);
    choice.plan = plan;
    choice.index = index;
    choice.waves = estimate.waves;
    choice.nanoseconds = estimate.nanoseconds;
    choice.any_fits = true;
    body(choice);
  });
}

bool IsForced(const Settings& settings, Tier tier, int group) {
  return tier == settings.tier && (tier != Tier::kCluster || settings.cluster == 0 || settings.cluster == group);
}

// Why there is no plan on the chip, whatever it may hold.
const char* WhyNoPlan(const Situation& situation) {
  const bool has_vectors = MakeView(situation.problem, situation.aligned, int64_t{1} << 30, true).lanes > 1;
  return has_vectors ? "a slab of whole channels would be wider than a block" : "single elements are streamed";
}

// Why nothing that is forced fits.
std::string WhyNot(const Situation& situation, const Settings& settings) {
  const Device& device = situation.device;
  if (OnChipView(situation.problem, situation.aligned).lanes == 1) return WhyNoPlan(situation);
  int64_t least_shared = INT64_MAX;
  ForAllPlans(situation, settings, [&](const OnChip& plan, int) {
    if (!IsForced(settings, TierOf(plan), plan.group)) return;
    least_shared = std::min<int64_t>(least_shared, plan.shared_bytes);
  });
  if (settings.tier == Tier::kCluster && device.largest_cluster < 2) {
    return "a GPU of compute capability " + std::to_string(device.compute_capability / 10) + "." +
           std::to_string(device.compute_capability % 10) + " has no clusters";
  }
  if (settings.tier == Tier::kGrid && !device.cooperative) return "this GPU has no cooperative launches";
  if (settings.tier == Tier::kGrid && situation.problem.virtual_batches > 1) {
    return "the blocks of all virtual batches would have to be resident at once";
  }
  if (least_shared == INT64_MAX) return "there is no work for a second block";
  const int64_t room = situation.occupancy.room;
  if (least_shared <= room) return "this GPU does not hold so many blocks at once";
  return "a block would have to keep " + Kilobytes(least_shared) + " on the chip, and has at most " + Kilobytes(room);
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

View OnChipView(const Problem& problem, bool aligned) {
  const View view = MakeView(problem, aligned, int64_t{1} << 30, true);
  const bool too_long = view.repeat > 1 && view.units / view.lanes > OnChipTuning::kThreads;
  const bool too_ragged = view.pixels / std::gcd(view.pixels, view.lanes) > OnChipTuning::kThreads;
  return too_long || too_ragged ? MakeView(problem, aligned, 0, true) : view;
}

int64_t RoomOf(const Device& device, int static_bytes) {
  // The limit of a block excludes what is reserved, by CUDA's documentation.
  const int64_t reserved = device.compute_capability >= 90 ? kReserved : 0;
  return std::max<int64_t>(device.shared_bytes_per_block - static_bytes - reserved, 0);
}

Occupancy OccupancyOnPaper(const Device& device) {
  Occupancy paper;
  paper.static_bytes = device.compute_capability >= 90 ? kReserved : 0;  // as compiled for these, by cuobjdump
  paper.room = RoomOf(device, paper.static_bytes);
  if (paper.room == 0) return paper;
  paper.blocks = device.multiprocessors;
  for (size_t s = 0; s < std::size(Occupancy::kClusters); ++s) {
    if (Occupancy::kClusters[s] > std::min(device.largest_cluster, device.multiprocessors)) continue;
    const int64_t clusters = int64_t{device.multiprocessors} * kPaperClusters[s] / kPaperMultiprocessors;
    paper.clusters[s] = static_cast<int>(std::max<int64_t>(clusters, 1));
  }
  return paper;
}

Status ChooseTier(const Situation& situation, const Settings& settings, Choice* choice) {
  *choice = {};
  choice->forced = settings.forced;
  choice->nanoseconds = StreamingTime(situation, settings.tuning);
  if (situation.IsSinglePass() || (settings.forced && settings.tier == Tier::kStreaming)) return {};

  bool found = false;
  ForChoices(situation, settings, [&](const Choice& plan) {
    if (settings.forced && !IsForced(settings, plan.tier, plan.plan.group)) return;
    const bool better = plan.nanoseconds < choice->nanoseconds || (settings.forced && !found);
    choice->any_fits = found = true;
    // The best of another tier is what the reason tells of.
    const Choice& worse = better ? *choice : plan;
    const Choice& best = better ? plan : *choice;
    const bool is_next = choice->next_nanoseconds == 0 || worse.nanoseconds < choice->next_nanoseconds;
    if (worse.tier != best.tier && (better || is_next) && !settings.forced) {
      choice->next = worse.tier;
      choice->next_nanoseconds = worse.nanoseconds;
    }
    if (!better) return;
    const Choice before = *choice;
    *choice = plan;
    choice->forced = before.forced;
    choice->next = before.next;
    choice->next_nanoseconds = before.next_nanoseconds;
  });
  if (!settings.forced || found) return {};
  return {StatusCode::kInvalidArgument, "the tier " + std::string(NameOf(settings.tier)) +
                                            " is forced, and cannot be had: " + WhyNot(situation, settings)};
}

std::vector<Choice> BestChoices(const Situation& situation, const Settings& settings) {
  std::vector<Choice> best(1);
  best[0].nanoseconds = StreamingTime(situation, settings.tuning);
  ForChoices(situation, settings, [&](const Choice& choice) {
    const auto same = std::find_if(best.begin(), best.end(), [&](const Choice& other) {
      return other.tier == choice.tier && (choice.tier != Tier::kCluster || other.plan.group == choice.plan.group);
    });
    if (same == best.end()) {
      best.push_back(choice);
    } else if (choice.nanoseconds < same->nanoseconds) {
      *same = choice;
    }
  });
  std::stable_sort(best.begin(), best.end(),
                   [](const Choice& a, const Choice& b) { return a.nanoseconds < b.nanoseconds; });
  return best;
}

double TimeOfPlan(const Situation& situation, int index, const Settings& settings) {
  if (index < 0) return StreamingTime(situation, settings.tuning);
  double time = 0;
  ForChoices(situation, settings, [&](const Choice& choice) {
    if (choice.index == index) time = choice.nanoseconds;
  });
  return time;
}

std::string Explain(const Situation& situation, const Choice& choice) {
  if (situation.IsSinglePass()) return "inference takes a single pass, with nothing to keep";
  const OnChip& plan = choice.plan;
  std::string what;
  if (choice.tier == Tier::kStreaming) {
    what = "two passes over memory";
  } else {
    what = std::to_string(plan.slabs) + (plan.slabs == 1 ? " slab of " : " slabs of ") +
           std::to_string(plan.SlabChannels()) + (plan.SlabChannels() == 1 ? " channel, " : " channels, ") +
           std::to_string(plan.group) + (plan.group == 1 ? " block each, " : " blocks each, ") +
           Kilobytes(plan.shared_bytes) + " a block";
    if (const int64_t batches = situation.problem.virtual_batches; batches > 1) {
      what += ", in each of " + std::to_string(batches) + " virtual batches";
    }
    if (plan.ReadAgain() > 0) {
      what += ", " + std::to_string(static_cast<int>(std::lround(100 * plan.ReadAgain()))) + " % read again";
    }
  }
  if (choice.forced) return what + ": the tier is forced";
  if (choice.tier == Tier::kStreaming && !choice.any_fits) {
    const bool planned = OnChipView(situation.problem, situation.aligned).lanes > 1;
    return what + ": " + (planned ? "the data do not fit on the chip" : WhyNoPlan(situation));
  }
  what += ": about " + Microseconds(choice.nanoseconds);
  if (choice.next_nanoseconds > 0) {
    what += ", against " + Microseconds(choice.next_nanoseconds) + " of " + NameOf(choice.next);
  }
  return what + (situation.occupancy.asked ? "" : ", by a table of how many blocks run at once");
}

}  // namespace tfops::cuda
