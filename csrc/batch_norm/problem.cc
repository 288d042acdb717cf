// The checks and derived quantities of a Problem.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <locale>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "csrc/batch_norm/activation.h"
#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/in_place.h"

namespace tfops {
namespace {

constexpr int64_t kMaxElements = int64_t{1} << 62;

// The shortest number that reads as this one.
std::string Shown(double value) {
  char text[32];
  for (int digits = 6; digits <= 17; ++digits) {
    std::snprintf(text, sizeof(text), "%.*g", digits, value);
    if (std::strtod(text, nullptr) == value) break;
  }
  return text;
}

Status InvalidArgument(std::string message) { return {StatusCode::kInvalidArgument, std::move(message)}; }

struct Parameter {
  const char* name;
  double Problem::* field;
};

std::vector<Parameter> ParametersOf(Activation activation) {
  switch (activation) {
    case Activation::kLeakyRelu:
      return {{"negative_slope", &Problem::negative_slope}};
    case Activation::kElu:
      return {{"alpha", &Problem::alpha}};
    case Activation::kRelu:
    case Activation::kBoundedRelu:
      return {{"max_value", &Problem::max_value},
              {"negative_slope", &Problem::negative_slope},
              {"threshold", &Problem::threshold}};
    default:
      return {};
  }
}

// Reads "name=number", in whatever locale. False if it is something else.
bool ReadParameter(const std::string& text, const std::vector<Parameter>& known, Problem* problem) {
  const size_t equals = text.find('=');
  if (equals == std::string::npos) return false;
  std::istringstream words(text.substr(0, equals)), numbers(text.substr(equals + 1));
  numbers.imbue(std::locale::classic());
  std::string name, rest;
  double value = 0;
  if (!(words >> name) || words >> rest || !(numbers >> value) || numbers >> rest) return false;
  for (const Parameter& parameter : known) {
    if (name == parameter.name) {
      problem->*parameter.field = value;
      return true;
    }
  }
  return false;
}

// The activation that does what relu does with the problem's parameters, and the least besides.
Activation ReluOf(const Problem& problem) {
  if (problem.threshold != 0) return Activation::kBoundedRelu;
  if (std::isinf(problem.max_value)) return problem.negative_slope == 0 ? Activation::kRelu : Activation::kLeakyRelu;
  return problem.max_value == 6 && problem.negative_slope == 0 ? Activation::kRelu6 : Activation::kBoundedRelu;
}

Status ValidateActivation(const Problem& problem) {
  for (const Parameter& parameter : ParametersOf(problem.activation)) {
    const double value = problem.*parameter.field;
    if (std::isfinite(value) || parameter.field == &Problem::max_value) continue;
    return InvalidArgument(std::string(parameter.name) + " of activation must be finite, but it is " + Shown(value));
  }
  if (problem.activation != Activation::kBoundedRelu) return {};
  if (!(problem.threshold >= 0)) {
    return InvalidArgument("threshold of activation must be >= 0, but it is " + Shown(problem.threshold));
  }
  if (!(problem.max_value > problem.threshold)) {
    return InvalidArgument("max_value of activation must be > threshold, which is " + Shown(problem.threshold) +
                           ", but it is " + Shown(problem.max_value));
  }
  return {};
}

Status ValidateInPlace(const Problem& problem) {
  if (!problem.training) return InvalidArgument("in_place must be False in inference, but it is True");
  if (problem.has_residual) return InvalidArgument("in_place must be False where there is a residual, but it is True");
  if (problem.virtual_batches > 1) {
    return InvalidArgument("in_place must be False where there are virtual batches, but it is True");
  }
  if (!IsInvertible(problem.activation)) {
    std::string names;
    for (const Activation known : kActivations) {
      if (IsInvertible(known)) names += std::string(names.empty() ? "'" : ", '") + NameOf(known) + "'";
    }
    return InvalidArgument("activation must be one of " + names + " where in_place is True, but it is '" +
                           NameOf(problem.activation) + "'");
  }
  for (const Parameter& parameter : ParametersOf(problem.activation)) {
    const double value = problem.*parameter.field;
    if (value > 0) continue;
    return InvalidArgument(std::string(parameter.name) +
                           " of activation must be > 0 where in_place is True, but it is " + Shown(value));
  }
  return {};
}

}  // namespace

Status Fold(const int64_t* dims, int rank, int64_t axis, Problem* problem) {
  if (rank < 2) return InvalidArgument("x must have rank >= 2, but its rank is " + std::to_string(rank));
  if (axis < -rank || axis >= rank) {
    return InvalidArgument("axis must be in [-rank, rank) = [" + std::to_string(-rank) + ", " + std::to_string(rank) +
                           "), but it is " + std::to_string(axis));
  }
  const int64_t channel_axis = axis < 0 ? axis + rank : axis;
  int64_t elements = 1;
  problem->outer = problem->channels = problem->inner = 1;
  for (int i = 0; i < rank; ++i) {
    if (dims[i] < 0) {
      return InvalidArgument("x must have no negative dimension, but dimension " + std::to_string(i) + " is " +
                             std::to_string(dims[i]));
    }
    // Zero dimensions do not excuse the others: outer * inner must not overflow either.
    const int64_t factor = dims[i] > 0 ? dims[i] : 1;
    if (elements > kMaxElements / factor) return InvalidArgument("x must have at most 2^62 elements");
    elements *= factor;
    (i < channel_axis ? problem->outer : i == channel_axis ? problem->channels : problem->inner) *= dims[i];
  }
  return {};
}

Status Validate(const Problem& problem) {
  if (!std::isfinite(problem.epsilon) || !(problem.epsilon >= 0)) {
    return InvalidArgument("epsilon must be finite and >= 0, but it is " + Shown(problem.epsilon));
  }
  if (!(problem.exponential_avg_factor >= 0 && problem.exponential_avg_factor <= 1)) {
    return InvalidArgument("exponential_avg_factor must be in [0, 1], but it is " +
                           Shown(problem.exponential_avg_factor));
  }
  const int64_t batches = problem.virtual_batches;
  const bool is_whole = batches > 0 ? problem.outer % batches == 0 : batches == 0 && problem.outer == 0;
  if (!is_whole || (batches != 1 && !problem.training)) {
    return InvalidArgument("virtual_batches must divide outer, and be 1 in inference, but it is " +
                           std::to_string(batches) + ", and outer is " + std::to_string(problem.outer));
  }
  if (const Status status = ValidateActivation(problem); !status.ok()) return status;
  return problem.in_place ? ValidateInPlace(problem) : Status();
}

Status ValidateMoments(const Problem& problem) {
  Problem of_phase = problem;
  of_phase.training = false;
  return Validate(of_phase);
}

Status SetVirtualBatches(const int64_t* dims, int rank, int64_t axis, int64_t virtual_batch_size, Problem* problem) {
  problem->virtual_batches = 1;
  if (virtual_batch_size == 0) return {};
  const std::string is = ", but it is " + std::to_string(virtual_batch_size);
  if (virtual_batch_size < 0) return InvalidArgument("virtual_batch_size must be > 0, or 0 for none" + is);
  if (axis == 0 || axis == -rank) {
    return InvalidArgument("virtual_batch_size must be 0 where the channels are dimension 0" + is);
  }
  if (dims[0] % virtual_batch_size != 0) {
    return InvalidArgument("virtual_batch_size must divide the batch, dimension 0 of x, but it is " +
                           std::to_string(virtual_batch_size) + ", and the batch has " + std::to_string(dims[0]) +
                           " entries (a data set's last batch is left out by drop_remainder=True)");
  }
  problem->virtual_batches = dims[0] / virtual_batch_size;
  return {};
}

const char* NameOf(Activation activation) {
  switch (activation) {
#define TFOPS_CASE(Name, text) \
  case Activation::k##Name:    \
    return text;
    TFOPS_ACTIVATIONS(TFOPS_CASE)
#undef TFOPS_CASE
  }
  return "";
}

Status ParseActivation(const std::string& text, Problem* problem) {
  const size_t opening = text.find('(');
  const bool has_parameters = opening != std::string::npos && text.back() == ')';
  const std::string name = has_parameters ? text.substr(0, opening) : text;
  std::string names;
  for (const Activation known : kActivations) {
    if (known == Activation::kBoundedRelu) continue;
    if (name == NameOf(known) && !(has_parameters && name.empty())) {
      problem->activation = known;
      if (!has_parameters) return {};
      if (known == Activation::kRelu) problem->negative_slope = 0;
      std::istringstream list(text.substr(opening + 1, text.size() - opening - 2));
      for (std::string parameter; std::getline(list, parameter, ',');) {
        if (ReadParameter(parameter, ParametersOf(known), problem)) continue;
        std::string parameters;
        for (const Parameter& each : ParametersOf(known)) {
          parameters += std::string(parameters.empty() ? "" : ", ") + each.name + "=number";
        }
        if (parameters.empty()) parameters = "nothing";
        return InvalidArgument("activation '" + name + "' takes " + parameters + ", but it is '" + text + "'");
      }
      if (known == Activation::kRelu || known == Activation::kLeakyRelu) problem->activation = ReluOf(*problem);
      return ValidateActivation(*problem);
    }
    names += std::string(names.empty() ? "'" : ", '") + NameOf(known) + "'";
  }
  return InvalidArgument("activation must be one of " + names + ", but it is '" + text + "'");
}

bool NeedsActivationBits(const Problem& problem) {
  return problem.training && problem.has_residual && IsPiecewiseLinear(problem.activation);
}

bool NeedsResidual(const Problem& problem) {
  return problem.has_residual && problem.activation != Activation::kNone && !NeedsActivationBits(problem);
}

ActivationBitsLayout LayoutOfActivationBits(const Problem& problem) {
  ActivationBitsLayout layout;
  if (problem.Elements() == 0) return layout;
  layout.row_elements = problem.channels == 1 ? problem.Elements() / problem.virtual_batches
                        : problem.inner == 1  ? problem.channels
                                              : problem.inner;
  layout.rows = problem.Elements() / layout.row_elements;
  layout.row_bytes = (layout.row_elements + 7) / 8;
  return layout;
}

}  // namespace tfops
