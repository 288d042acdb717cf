// The choice of a tier and of its plan, for GPUs of several kinds.

#include "csrc/batch_norm/cuda/policy.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/batch_norm/cuda/prepare.h"
#include "csrc/batch_norm/cuda/tuning.h"
#include "csrc/tests/problems.h"
#include "csrc/tests/testing.h"
#include "csrc/tests/walks.h"

namespace tfops::cuda {
namespace {

constexpr int kProblems = 1000;
constexpr int64_t kMostElements = 3 << 20;

// Devices with clusters and without, large and small, with and without cooperative launches.
const Device kDevices[] = {
    {},
    {80, 108, 163 << 10, 40 << 20, 1, true},
    {70, 80, 96 << 10, 6 << 20, 1, true},
    {120, 170, 99 << 10, 96 << 20, 8, true},
    {75, 40, 64 << 10, 4 << 20, 1, true},
    {90, 5, 227 << 10, 4 << 20, 16, true},
    {75, 14, 48 << 10, 1 << 20, 1, false},
    {90, 1, 227 << 10, 1 << 20, 16, true},
};

Settings Forced(Tier tier, int cluster = 0) {
  Settings settings;
  settings.forced = true;
  settings.tier = tier;
  settings.cluster = cluster;
  return settings;
}

struct Case {
  Problem problem;
  Pass pass;
  bool aligned;
  Device device;

  bool IsSinglePass() const { return pass == Pass::kForward && !problem.training; }
  Situation OnPaper() const { return {problem, pass, aligned, device, OccupancyOnPaper(device)}; }
  Status Choose(const Settings& settings, Choice* choice) const { return ChooseTier(OnPaper(), settings, choice); }
  Choice Chosen() const {
    Choice choice;
    EXPECT_TRUE(Choose({}, &choice).ok());
    return choice;
  }
  // What is chosen if only this tier may be; nothing if that cannot be had.
  std::optional<Choice> ChosenOf(Tier tier) const {
    Choice choice;
    if (!Choose(Forced(tier), &choice).ok()) return {};
    return choice;
  }
};

// Calls body(case) for small and huge problems, each on one of the devices.
template <typename Body>
void ForCases(Body body) {
  const auto draw = [&body](const Problem& problem, Random* random) {
    const Case drawn{problem, random->Flag() ? Pass::kForward : Pass::kBackward, random->Below(4) > 0,
                     random->Of(kDevices)};
    testing::about += std::string(drawn.pass == Pass::kForward ? ", forward" : ", backward") +
                      (drawn.aligned ? ", " : ", unaligned, ") + std::to_string(drawn.device.multiprocessors) +
                      " multiprocessors";
    body(drawn);
  };
  ForSmallProblems(kProblems, kMostElements, draw);
  ForHugeProblems(kProblems / 4, draw);
}

// Calls body(case, plan) for every plan that is chosen on the chip, of all tiers or of one.
template <typename Body>
void ForPlans(Body body) {
  ForCases([&body](const Case& drawn) {
    if (drawn.IsSinglePass()) return;
    const std::string about = testing::about;
    for (const Tier tier : {Tier::kOneBlock, Tier::kCluster, Tier::kGrid}) {
      testing::about = about + ", " + NameOf(tier);
      if (const auto choice = drawn.ChosenOf(tier)) body(drawn, choice->plan);
    }
  });
}

TEST(ForcedTiersAreTakenOrRefused) {
  int taken = 0, refused = 0;
  ForCases([&](const Case& drawn) {
    for (const Tier tier : kTiers) {
      Choice choice;
      const Status status = drawn.Choose(Forced(tier), &choice);
      if (drawn.IsSinglePass() || tier == Tier::kStreaming) {
        EXPECT_TRUE(status.ok());
        EXPECT_EQ(choice.tier, Tier::kStreaming);
        continue;
      }
      EXPECT_TRUE(choice.forced);
      ++(status.ok() ? taken : refused);
      if (status.ok()) {
        EXPECT_EQ(choice.tier, tier);
        EXPECT_TRUE(choice.any_fits);
      } else {
        const std::string expected = std::string("the tier ") + NameOf(tier) + " is forced, and cannot be had: ";
        EXPECT_EQ(status.code, StatusCode::kInvalidArgument);
        EXPECT_EQ(status.message.substr(0, expected.size()), expected);
        EXPECT_LT(expected.size(), status.message.size());
      }
    }
  });
  EXPECT_LT(100, taken);
  EXPECT_LT(100, refused);
}

TEST(InferenceForwardIsOnePass) {
  ForCases([](const Case& drawn) {
    Case inference = drawn, training = drawn;
    inference.problem.training = false;
    training.problem.training = true;
    inference.pass = training.pass = Pass::kForward;
    const Choice one = inference.Chosen();
    EXPECT_EQ(one.tier, Tier::kStreaming);
    const auto two = training.ChosenOf(Tier::kStreaming);
    EXPECT_TRUE(two.has_value() && one.nanoseconds < two->nanoseconds);
  });
}

// What a choice is of: the least time of all tiers; and what it says of the next best.
TEST(ChoicesTakeTheLeastTime) {
  int on_chip = 0;
  ForCases([&](const Case& drawn) {
    const Choice choice = drawn.Chosen();
    EXPECT_TRUE(!choice.forced);
    EXPECT_TRUE(std::isfinite(choice.nanoseconds) && choice.nanoseconds > 0);
    if (drawn.IsSinglePass()) return;
    bool any_fits = false;
    double next = 0;
    for (const Tier tier : kTiers) {
      const auto other = drawn.ChosenOf(tier);
      if (!other) {
        EXPECT_TRUE(choice.tier != tier);
        continue;
      }
      any_fits = any_fits || tier != Tier::kStreaming;
      EXPECT_LE(choice.nanoseconds, other->nanoseconds);
      if (tier == choice.tier) {
        EXPECT_EQ(other->nanoseconds, choice.nanoseconds);
      } else if (next == 0 || other->nanoseconds < next) {
        next = other->nanoseconds;
      }
    }
    on_chip += choice.tier != Tier::kStreaming;
    EXPECT_EQ(choice.any_fits, any_fits);
    EXPECT_EQ(choice.next_nanoseconds, next);
    if (next > 0) EXPECT_EQ(drawn.ChosenOf(choice.next)->nanoseconds, next);
  });
  EXPECT_LT(100, on_chip);
}

TEST(PlansFitTheDevice) {
  ForPlans([](const Case& drawn, const OnChip& plan) {
    const Device& device = drawn.device;
    EXPECT_LE(plan.shared_bytes, RoomOf(device, device.compute_capability >= 90 ? 1024 : 0));
    EXPECT_LE(plan.threads, OnChipTuning::kThreads);
    EXPECT_EQ(plan.threads % 32, 0);
    EXPECT_LE(plan.block.x * plan.block.y * plan.block.z, plan.threads);
    EXPECT_LT(1, plan.lanes);
    EXPECT_LE(plan.Blocks(), INT32_MAX);
    EXPECT_EQ(plan.group > 1, plan.scope != Scope::kBlock);
    if (plan.scope == Scope::kCluster) EXPECT_LE(plan.group, device.largest_cluster);
    if (plan.scope != Scope::kGrid) return;
    // Blocks that meet are resident, all at once, each with the registers of a multiprocessor.
    EXPECT_TRUE(device.cooperative);
    EXPECT_LE(plan.Blocks(), device.multiprocessors);
  });
}

// Every block of a group has steps, and room to keep what it reads in them.
TEST(GroupsShareTheirSteps) {
  ForPlans([](const Case&, const OnChip& plan) {
    EXPECT_EQ(plan.FirstStep(0), 0);
    EXPECT_EQ(plan.FirstStep(plan.group), plan.steps);
    for (int64_t rank = 0; rank < plan.group; ++rank) {
      const int64_t steps = plan.FirstStep(rank + 1) - plan.FirstStep(rank);
      EXPECT_LT(0, steps);
      EXPECT_LE(steps, plan.share_steps);
      EXPECT_LE(plan.share_steps - 1, steps);
    }
    EXPECT_EQ(plan.FirstToMerge(0), 0);
    EXPECT_EQ(plan.FirstToMerge(plan.group), plan.SlabChannels());
  });
}

// What lies in shared memory, one behind the other, by onchip.h; and that a block keeps what there is room for.
TEST(SharedMemoryHoldsWhatABlockKeeps) {
  int whole = 0, in_part = 0;
  ForPlans([&](const Case& drawn, const OnChip& plan) {
    const int64_t size = ElementBytes(drawn.problem.dtype), arithmetic = std::max<int64_t>(size, 4);
    const int64_t channels = plan.SlabChannels(), row = plan.threads, vectors = row * plan.lanes * size;
    const bool backward = drawn.pass == Pass::kBackward;
    const bool bits = NeedsActivationBits(drawn.problem) && (backward || plan.Folded());
    const int arrays = backward ? 2 + NeedsResidual(drawn.problem) : 1;
    const std::pair<int64_t, int64_t> pieces[] = {
        {plan.totals_at, (backward ? 16 : 32) * channels},
        {plan.own_at, (backward ? 16 : 24) * channels},
        {plan.channels_at, (backward ? 2 : 3) * arithmetic * channels},
        {plan.numbers_at, plan.sums.numbers * plan.sums.units * arithmetic},
        {plan.parts_at, int64_t{8} * plan.sums.parts * plan.sums.units},
        {plan.bits_at, bits ? plan.share_steps * row : 0},
        {plan.kept_at, arrays * plan.shared_steps * vectors},
        {plan.residual_at, plan.keeps_residual ? plan.share_steps * vectors : 0},
    };
    int64_t end = 0;
    for (const auto& [at, bytes] : pieces) {
      EXPECT_EQ(at % 16, 0);
      EXPECT_LE(end, at);
      end = at + bytes;
    }
    EXPECT_LE(end, plan.shared_bytes);
    EXPECT_LE(plan.sums.parts * plan.sums.units, std::max(plan.threads, plan.sums.units));

    const int kept = plan.register_steps + plan.shared_steps;
    EXPECT_LE(kept, plan.share_steps);
    EXPECT_EQ(plan.ReadAgain() > 0, kept < plan.share_steps);
    EXPECT_LE(plan.register_steps, KeptInRegisters(drawn.pass, plan.lanes));
    if (kept < plan.share_steps) {
      const int64_t room = drawn.OnPaper().occupancy.room;
      EXPECT_LE(plan.shared_bytes, room);
      EXPECT_LT(room, plan.shared_bytes + arrays * vectors);
      EXPECT_TRUE(!plan.keeps_residual);
    }
    EXPECT_TRUE(!plan.keeps_residual || (!backward && drawn.problem.has_residual));
    ++(kept < plan.share_steps ? in_part : whole);
  });
  EXPECT_LT(100, whole);
  EXPECT_LT(100, in_part);
}

// Slabs have whole channels, and whole rows of activation bits or threads that share a byte of them side by side.
TEST(SlabsHaveWholeChannels) {
  ForPlans([](const Case& drawn, const OnChip& plan) {
    EXPECT_LE((plan.slabs - 1) * plan.SlabChannels(), drawn.problem.channels - 1);
    EXPECT_LE(drawn.problem.channels, plan.slabs * plan.SlabChannels());
    EXPECT_EQ(plan.sums.units, plan.planes ? plan.SlabChannels() : plan.SlabChannels() * plan.UnitsPerChannel());
    if (plan.repeat > 1) EXPECT_EQ(plan.slabs, 1);
    if (!NeedsActivationBits(drawn.problem)) return;
    if (plan.Folded()) {
      EXPECT_EQ(plan.sums.units % plan.bits_row_elements, 0);
    } else {
      EXPECT_EQ(plan.block.x * plan.lanes % 8, 0);
    }
  });
}

TEST(PlansWalkEveryElementOnce) {
  ForPlans([](const Case& drawn, const OnChip& plan) {
    const Problem& problem = drawn.problem;
    if (problem.Elements() > 100'000) return;
    Cover cover;
    bool own_channels = true;
    for (int64_t slab = 0; slab < plan.slabs; ++slab) {
      for (int64_t rank = 0; rank < plan.group; ++rank) {
        const int64_t first = plan.FirstStep(rank);
        ForVectorsOfBlock(plan, Step{slab, rank, first}, plan.FirstStep(rank + 1) - first, [&](const auto& walk, Step) {
          cover.Add(walk.Offset(), plan.lanes);
          for (int lane = 0; lane < plan.lanes; ++lane) {
            const int64_t channel = (walk.Offset() + lane) / problem.inner % problem.channels;
            own_channels = own_channels && channel / plan.SlabChannels() == slab;
          }
        });
      }
    }
    EXPECT_TRUE(cover.Is(problem.Elements()));
    EXPECT_TRUE(own_channels);
  });
}

// More of anything but multiprocessors leaves all plans that there were, none of which takes longer for it. (More for a
// block may keep a residual, which may take longer.)
TEST(BetterDevicesAreNoSlower) {
  const std::pair<const char*, void (*)(Device*)> kBetter[] = {
      {"L2", [](Device* device) { device->l2_bytes *= 2; }},
      {"cooperative launches", [](Device* device) { device->cooperative = true; }},
      {"a cluster", [](Device* device) { device->largest_cluster *= 2; }},
      {"a block's shared memory", [](Device* device) { device->shared_bytes_per_block *= 2; }}};
  ForCases([&](const Case& drawn) {
    const std::string about = testing::about;
    for (const auto& [what, improve] : kBetter) {
      if (what == kBetter[3].first && drawn.pass == Pass::kForward && drawn.problem.has_residual) continue;
      testing::about = about + ", with more of " + what;
      Case better = drawn;
      improve(&better.device);
      EXPECT_LE(better.Chosen().nanoseconds, drawn.Chosen().nanoseconds);
    }
  });
}

TEST(MoreDataTakesLonger) {
  ForCases([](const Case& drawn) {
    const auto time = [](const Case& any) { return any.ChosenOf(Tier::kStreaming)->nanoseconds; };
    Case more = drawn;
    more.problem.outer += 1 + drawn.problem.outer / 10;
    EXPECT_LT(time(drawn), time(more));
    more = drawn;
    more.problem.channels += 1;
    EXPECT_LT(time(drawn), time(more));
    more = drawn;
    more.problem.inner += 1;
    EXPECT_LT(time(drawn), time(more));
    more = drawn;
    more.problem.has_residual = true;
    EXPECT_LE(time(drawn), time(more));
    more = drawn;
    more.problem.dtype = DataType::kFloat64;
    EXPECT_LE(time(drawn), time(more));
  });
}

// What CUDA says of a kernel is what counts, not the table: a size of clusters that it does not have is in no plan, and
// if it runs fewer of them at once, they take more waves.
TEST(PlansGoByWhatADeviceSays) {
  int clusters = 0, grids = 0;
  ForCases([&](const Case& drawn) {
    Situation situation = drawn.OnPaper();
    Choice whole;
    if (drawn.IsSinglePass()) return;
    if (ChooseTier(situation, Forced(Tier::kCluster), &whole).ok()) {
      ++clusters;
      Choice other;
      std::fill(std::begin(situation.occupancy.clusters), std::end(situation.occupancy.clusters), 1);
      EXPECT_TRUE(ChooseTier(situation, Forced(Tier::kCluster, whole.plan.group), &other).ok());
      EXPECT_LE(whole.waves, other.waves);
      EXPECT_EQ(other.waves, other.plan.slabs);
      EXPECT_LE(whole.nanoseconds, other.nanoseconds);
      for (size_t s = 0; s < std::size(Occupancy::kClusters); ++s) {
        if (Occupancy::kClusters[s] == whole.plan.group) situation.occupancy.clusters[s] = 0;
      }
      EXPECT_TRUE(!ChooseTier(situation, Forced(Tier::kCluster, whole.plan.group), &other).ok());
    }
    situation = drawn.OnPaper();
    if (ChooseTier(situation, Forced(Tier::kGrid), &whole).ok()) {
      ++grids;
      situation.occupancy.blocks = 0;
      Choice other;
      EXPECT_TRUE(!ChooseTier(situation, Forced(Tier::kGrid), &other).ok());
      EXPECT_TRUE(!ChooseTier(situation, Forced(Tier::kOneBlock), &other).ok());
    }
  });
  EXPECT_LT(50, clusters);
  EXPECT_LT(100, grids);
}

// The numbers that are said of a whole H100, which the table has.
TEST(PaperHasTheClustersOfAnH100) {
  const Occupancy h100 = OccupancyOnPaper({});
  const int expected[] = {66, 31, 15, 7};
  for (size_t s = 0; s < std::size(expected); ++s) {
    EXPECT_EQ(h100.clusters[s], expected[s]);
  }
  EXPECT_EQ(h100.room, int64_t{225} << 10);
  EXPECT_TRUE(!h100.asked);
}

TEST(GridsLeaveMultiprocessorsToOthers) {
  int grids = 0;
  ForCases([&](const Case& drawn) {
    if (drawn.IsSinglePass()) return;
    Settings settings = Forced(Tier::kGrid);
    settings.free_multiprocessors = 4;
    Choice choice;
    if (!drawn.Choose(settings, &choice).ok()) return;
    ++grids;
    EXPECT_LE(choice.plan.Blocks(), drawn.device.multiprocessors - 4);
    EXPECT_LE(choice.plan.group, drawn.device.multiprocessors - 4);
  });
  EXPECT_LT(100, grids);
}

// The best of each tier, and of each size of clusters: what forcing it chooses.
TEST(BestChoicesAreThoseThatForcingTakes) {
  ForCases([](const Case& drawn) {
    const std::vector<Choice> all = BestChoices(drawn.OnPaper(), {});
    EXPECT_EQ(all.front().nanoseconds, drawn.Chosen().nanoseconds);
    size_t expected = 0;
    for (const Tier tier : kTiers) {
      for (const int cluster : {0, 2, 4, 8, 16}) {
        if ((tier == Tier::kCluster) != (cluster != 0)) continue;
        Choice choice;
        if (!drawn.Choose(Forced(tier, cluster), &choice).ok() || choice.tier != tier) continue;
        ++expected;
        EXPECT_TRUE(std::any_of(all.begin(), all.end(), [&](const Choice& other) {
          return other.tier == tier && other.index == choice.index && other.nanoseconds == choice.nanoseconds;
        }));
        EXPECT_EQ(TimeOfPlan(drawn.OnPaper(), choice.index, {}), choice.nanoseconds);
      }
    }
    EXPECT_EQ(all.size(), expected);
  });
}

// Other constants make other estimates: each of them counts somewhere.
TEST(EveryConstantOfTheTuningCounts) {
  const std::map<std::string, double> defaults = ToPublic({}).tuning;
  EXPECT_EQ(defaults.size(), size_t{12});
  std::map<std::string, int> counted;
  ForCases([&](const Case& drawn) {
    for (const Choice& choice : BestChoices(drawn.OnPaper(), {})) {
      for (const auto& [name, value] : defaults) {
        Settings settings;
        EXPECT_TRUE(Apply({{name, value / 2}}, &settings.tuning).ok());
        counted[name] += TimeOfPlan(drawn.OnPaper(), choice.index, settings) != choice.nanoseconds;
      }
    }
  });
  for (const auto& [name, value] : defaults) {
    testing::about = name;
    EXPECT_LT(0, counted[name]);
  }
}

// Choices that differ in one thing alone are each remembered by themselves: for all GPUs, and forced tiers, and for
// more problems than are remembered.
TEST(ChoicesAreRememberedAsTheyWere) {
  constexpr int64_t kSizes[] = {1, 7, 64, 1024};
  Random random(5);
  std::vector<Case> cases;
  for (int i = 0; i < 6000; ++i) {
    Problem problem;
    DrawSettings(&random, &problem);
    problem.outer = random.Of(kSizes);
    problem.channels = random.Of(kSizes);
    problem.inner = random.Of(kSizes);
    cases.push_back({problem, random.Flag() ? Pass::kForward : Pass::kBackward, random.Flag(), random.Of(kDevices)});
  }
  for (const char* tier : {"", "streaming", "one_block", ""}) {
    PolicySettings given = GetPolicySettings();
    given.tier = tier;
    EXPECT_TRUE(SetPolicySettings(given).ok());
    Settings settings;
    EXPECT_TRUE(Apply(given, &settings).ok());
    for (const Case& drawn : cases) {
      testing::about = Shown(drawn.problem);
      const auto number = std::find_if(std::begin(kDevices), std::end(kDevices), [&](const Device& device) {
        return device.multiprocessors == drawn.device.multiprocessors;
      });
      Device device = drawn.device;
      device.number = static_cast<int>(number - kDevices);
      std::shared_ptr<const Prepared> prepared;
      EXPECT_TRUE(Prepare(drawn.problem, drawn.pass, device, &prepared).ok());
      Choice expected;
      const Status status = drawn.Choose(settings, &expected);
      const Choice& recalled = prepared->choice[drawn.aligned];
      EXPECT_EQ(prepared->status[drawn.aligned].message, status.message);
      EXPECT_EQ(recalled.tier, expected.tier);
      EXPECT_EQ(recalled.nanoseconds, expected.nanoseconds);
      EXPECT_EQ(recalled.plan.shared_bytes, expected.plan.shared_bytes);
      EXPECT_EQ(recalled.plan.lanes, expected.plan.lanes);
      EXPECT_EQ(recalled.forced, expected.forced);
      const StreamingTiling tiling = MakeStreamingTiling(drawn.problem, drawn.aligned, drawn.device.multiprocessors);
      EXPECT_EQ(prepared->tiling[drawn.aligned].split_steps, tiling.split_steps);
      EXPECT_LE(std::max(expected.plan.ExchangedItems(), tiling.Splits() * tiling.units), prepared->items);
    }
  }
}

}  // namespace

// The devices of these tests say what is on paper.
Status AskOccupancy(const Device& device, DataType, Pass, Occupancy* occupancy) {
  *occupancy = OccupancyOnPaper(device);
  return {};
}

}  // namespace tfops::cuda
