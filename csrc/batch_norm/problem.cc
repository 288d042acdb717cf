// The checks and derived quantities of a Problem.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <utility>

#include "csrc/batch_norm/activation.h"
#include "csrc/batch_norm/batch_norm.h"

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

Status ParseActivation(const std::string& name, Activation* activation) {
  std::string names;
  for (const Activation known : kActivations) {
    if (name == NameOf(known)) {
      *activation = known;
      return {};
    }
    names += std::string(names.empty() ? "'" : ", '") + NameOf(known) + "'";
  }
  return InvalidArgument("activation must be one of " + names + ", but it is '" + name + "'");
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
  layout.row_elements = problem.channels == 1 ? problem.Elements()
                        : problem.inner == 1  ? problem.channels
                                              : problem.inner;
  layout.rows = problem.Elements() / layout.row_elements;
  layout.row_bytes = (layout.row_elements + 7) / 8;
  return layout;
}

}  // namespace tfops
