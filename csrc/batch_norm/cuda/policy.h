// Which tier a problem takes. Host code without CUDA, and without memory: prepare.h remembers.
//
// The on-chip tiers are alike but for the number of blocks that share a slab of channels, and how these meet. So the
// policy lists the plans that fit the GPU, reckons for each how long it will take, and takes the fastest; or streaming,
// if that is faster than all of them.

#ifndef TFOPS_BATCH_NORM_CUDA_POLICY_H_
#define TFOPS_BATCH_NORM_CUDA_POLICY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda/onchip.h"
#include "csrc/batch_norm/cuda/tuning.h"

namespace tfops::cuda {

enum class Tier { kOneBlock, kCluster, kGrid, kStreaming };
inline constexpr Tier kTiers[] = {Tier::kOneBlock, Tier::kCluster, Tier::kGrid, Tier::kStreaming};
const char* NameOf(Tier tier);

// PolicySettings, checked.
struct Settings {
  bool forced = false;
  Tier tier = Tier::kStreaming;  // if forced
  int cluster = 0;
  int free_multiprocessors = 0;
  PolicyTuning tuning;
};
PolicySettings ToPublic(const Settings& settings);
// Changes what `given` says. InvalidArgument, and no change, if something in it is wrong.
Status Apply(const PolicySettings& given, Settings* settings);
Status Apply(const std::map<std::string, double>& given, PolicyTuning* tuning);
// Reads TFOPS_TIER and TFOPS_FREE_MULTIPROCESSORS.
Status ReadEnvironment(Settings* settings);

// A problem, and what its plans have to fit.
struct Situation {
  Problem problem;  // with at least one element
  Pass pass = Pass::kForward;
  bool aligned = true;
  Device device;
  Occupancy occupancy;  // of the on-chip kernel

  bool IsSinglePass() const { return pass == Pass::kForward && !problem.training; }
};

// What the on-chip tiers make of a tensor. They do not take single elements: those have no plans.
View OnChipView(const Problem& problem, bool aligned);

// What an on-chip kernel is taken to have on a device that cannot be asked: a table, made of numbers of an H100.
Occupancy OccupancyOnPaper(const Device& device);

// Dynamic shared memory that a block may have, of a kernel with so much static memory, by every reading of CUDA's
// numbers: whether or not static memory is part of the limit of a block, and whether or not what CUDA reserves is part
// of either.
int64_t RoomOf(const Device& device, int static_bytes);

struct Choice {
  Tier tier = Tier::kStreaming;
  bool forced = false;
  OnChip plan;  // of the on-chip tiers
  int index = -1;
  int waves = 1;
  double nanoseconds = 0;
  // The best choice of another tier, for the explanation.
  Tier next = Tier::kStreaming;
  double next_nanoseconds = 0;
  bool any_fits = false;
};

// InvalidArgument if a tier is forced that cannot be had.
Status ChooseTier(const Situation& situation, const Settings& settings, Choice* choice);

// The best choice of each tier and size of clusters, fastest first. No tier is forced.
std::vector<Choice> BestChoices(const Situation& situation, const Settings& settings);

// What the plan of that index takes; 0 if there is none, or it does not fit. -1 is streaming.
double TimeOfPlan(const Situation& situation, int index, const Settings& settings);

// Why, in a sentence.
std::string Explain(const Situation& situation, const Choice& choice);

}  // namespace tfops::cuda

#endif  // TFOPS_BATCH_NORM_CUDA_POLICY_H_
