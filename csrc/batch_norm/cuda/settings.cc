// The settings of the policy: checked, from the environment, and as callers see them.

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <map>
#include <string>
#include <string_view>
#include <system_error>

#include "csrc/batch_norm/cuda/policy.h"

namespace tfops::cuda {
namespace {

struct TuningField {
  const char* name;
  double PolicyTuning::* member;
  bool ratio = false;
};

constexpr TuningField kTuning[] = {
    {"launch", &PolicyTuning::launch},
    {"next_launch", &PolicyTuning::next_launch},
    {"phase", &PolicyTuning::phase},
    {"merge", &PolicyTuning::merge},
    {"cluster_barrier", &PolicyTuning::cluster_barrier},
    {"grid_barrier", &PolicyTuning::grid_barrier},
    {"merge_block", &PolicyTuning::merge_block},
    {"memory_rate", &PolicyTuning::memory_rate},
    {"latency", &PolicyTuning::latency},
    {"own_rate", &PolicyTuning::own_rate},
    {"cache_factor", &PolicyTuning::cache_factor, true},
    {"cache_share", &PolicyTuning::cache_share, true},
};

std::string Text(double value) {
  std::string text = std::to_string(value);
  text.erase(std::min(text.find_last_not_of('0') + 1, text.size()));
  return text.back() == '.' ? text.substr(0, text.size() - 1) : text;
}

Status Invalid(const std::string& message) { return {StatusCode::kInvalidArgument, message}; }

Status ParseTier(const std::string& what, const std::string& name, Settings* settings) {
  settings->forced = !name.empty();
  if (name.empty()) return {};
  for (const Tier candidate : kTiers) {
    settings->tier = candidate;
    if (name == NameOf(candidate)) return {};
  }
  return Invalid(what + " must be one_block, cluster, grid or streaming, but it is " + name);
}

}  // namespace

Status Apply(const std::map<std::string, double>& given, PolicyTuning* tuning) {
  PolicyTuning changed = *tuning;
  for (const auto& [name, value] : given) {
    const auto* const field =
        std::find_if(std::begin(kTuning), std::end(kTuning), [&](const auto& f) { return f.name == name; });
    if (field == std::end(kTuning)) {
      std::string names;
      for (const TuningField& known : kTuning) names += (names.empty() ? "" : ", ") + std::string(known.name);
      return {StatusCode::kInvalidArgument, "a constant of the tuning must be one of " + names + ", but it is " + name};
    }
    if (field->ratio && !(value >= 0 && value <= 1)) {
      return {StatusCode::kInvalidArgument,
              "the tuning's " + name + " must be a number from 0 to 1, but it is " + Text(value)};
    }
    if (!(value > 0 || field->ratio) || !std::isfinite(value)) {
      return {StatusCode::kInvalidArgument,
              "the tuning's " + name + " must be a finite number > 0, but it is " + Text(value)};
    }
    changed.*field->member = value;
  }
  *tuning = changed;
  return {};
}

Status Apply(const PolicySettings& given, Settings* settings) {
  Settings changed = *settings;
  if (const Status status = ParseTier("tier", given.tier, &changed); !status.ok()) return status;
  const auto is_size = [&](int size) { return size == given.cluster; };
  if (given.cluster != 0 && std::none_of(std::begin(Occupancy::kClusters), std::end(Occupancy::kClusters), is_size)) {
    return {StatusCode::kInvalidArgument,
            "cluster must be 2, 4, 8, 16, or 0 for any size, but it is " + std::to_string(given.cluster)};
  }
  if (given.free_multiprocessors < 0) {
    return {StatusCode::kInvalidArgument,
            "free_multiprocessors must be >= 0, but it is " + std::to_string(given.free_multiprocessors)};
  }
  changed.cluster = given.cluster;
  changed.free_multiprocessors = given.free_multiprocessors;
  if (const Status status = Apply(given.tuning, &changed.tuning); !status.ok()) return status;
  *settings = changed;
  return {};
}

PolicySettings ToPublic(const Settings& settings) {
  PolicySettings made;
  if (settings.forced) made.tier = NameOf(settings.tier);
  made.cluster = settings.cluster;
  made.free_multiprocessors = settings.free_multiprocessors;
  for (const TuningField& field : kTuning) made.tuning[field.name] = settings.tuning.*field.member;
  return made;
}

Status ReadEnvironment(Settings* settings) {
  const char* const tier = std::getenv("TFOPS_TIER");
  if (const Status status = ParseTier("TFOPS_TIER", tier ? tier : "", settings); !status.ok()) return status;
  const char* const given = std::getenv("TFOPS_FREE_MULTIPROCESSORS");
  const std::string_view text = given ? given : "";
  if (text.empty()) return {};
  int number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || number < 0) {
    return {StatusCode::kInvalidArgument,
            "TFOPS_FREE_MULTIPROCESSORS must be a whole number >= 0, but it is " + std::string(text)};
  }
  settings->free_multiprocessors = number;
  return {};
}

}  // namespace tfops::cuda
