// What the ops have for inputs and outputs under XLA, as tables, and which kernels they call. Free of any framework.

#ifndef TFOPS_XLA_OPERANDS_H_
#define TFOPS_XLA_OPERANDS_H_

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/calls.h"

namespace tfops {

// kStatistics: a vector, or one for each virtual batch; kRows: x without its last dimension.
enum class Extent { kNothing, kData, kVector, kStatistics, kActivationBits, kRows };

template <typename Arrays>
struct Operand {
  const char* name;
  Extent extent;
  void (*set)(Arrays*, void*);  // puts the pointer into its field; not called for kNothing
  bool may_be_empty = false;    // and then it is as good as not there
};

template <auto Field, typename Arrays>
void Set(Arrays* arrays, void* data) {
  arrays->*Field = static_cast<std::remove_reference_t<decltype(arrays->*Field)>>(data);
}

template <typename Arrays>
using Operands = std::vector<Operand<Arrays>>;

inline Extent DataIf(bool condition) { return condition ? Extent::kData : Extent::kNothing; }
inline Extent ActivationBitsOf(const Problem& problem) {
  return NeedsActivationBits(problem) ? Extent::kActivationBits : Extent::kNothing;
}

// The mask of an op that takes one, or null.
inline Mask* MaskOf(MomentsArrays* arrays) { return &arrays->mask; }
inline Mask* MaskOf(GradientNormalizeArrays* arrays) { return &arrays->statistics.mask; }
inline Mask* MaskOf(ForwardArrays*) { return nullptr; }
inline Mask* MaskOf(BackwardArrays*) { return nullptr; }

template <typename Arrays>
void SetFlags(Arrays* arrays, void* data) {
  MaskOf(arrays)->flags = static_cast<const uint8_t*>(data);
}

template <const void* StatisticsGradient::* kField>
void SetStatistic(GradientNormalizeArrays* arrays, void* data) {
  arrays->statistics.*kField = data;
}

// `count` is the number of an op's inputs, from which a list of none, one or two follows.

struct Training : ForwardCall {
  static constexpr bool kTraining = true;

  static Operands<Arrays> Inputs(const Problem& problem, size_t count) {
    Operands<Arrays> inputs = {{"x", Extent::kData, Set<&Arrays::x>},
                               {"scale", Extent::kVector, Set<&Arrays::scale>},
                               {"offset", Extent::kVector, Set<&Arrays::offset>}};
    if (count >= inputs.size() + 2) {
      const bool may_be_empty = MayLackRunning(problem);
      inputs.push_back({"mean", Extent::kVector, Set<&Arrays::mean>, may_be_empty});
      inputs.push_back({"variance", Extent::kVector, Set<&Arrays::variance>, may_be_empty});
    }
    if (problem.has_residual) inputs.push_back({"residual", Extent::kData, Set<&Arrays::residual>});
    return inputs;
  }

  static Operands<Arrays> Outputs(const Problem& problem) {
    return {{"y", Extent::kData, Set<&Arrays::y>},
            {"mean", Extent::kVector, Set<&Arrays::mean_out>},
            {"variance", Extent::kVector, Set<&Arrays::variance_out>},
            {"saved_mean", Extent::kStatistics, Set<&Arrays::saved_mean>},
            {"saved_inv_std", Extent::kStatistics, Set<&Arrays::saved_inv_std>},
            {"mask", ActivationBitsOf(problem), Set<&Arrays::activation_bits>}};
  }
};

struct TrainingGrad : BackwardCall {
  static constexpr bool kTraining = true;

  static Operands<Arrays> Inputs(const Problem& problem, size_t count) {
    Operands<Arrays> inputs = {{"dy", Extent::kData, Set<&Arrays::dy>},
                               {"x", Extent::kData, Set<&Arrays::x>},
                               {"scale", Extent::kVector, Set<&Arrays::scale>},
                               {"offset", Extent::kVector, Set<&Arrays::offset>},
                               {"saved_mean", Extent::kStatistics, Set<&Arrays::mean>},
                               {"saved_inv_std", Extent::kStatistics, Set<&Arrays::inv_std>},
                               {"mask", ActivationBitsOf(problem), Set<&Arrays::activation_bits>}};
    if (count >= inputs.size() + 2) {
      inputs.push_back({"dmean", Extent::kVector, Set<&Arrays::dmean>});
      inputs.push_back({"dvariance", Extent::kVector, Set<&Arrays::dvariance>});
    }
    if (NeedsResidual(problem)) inputs.push_back({"residual", Extent::kData, Set<&Arrays::residual>});
    return inputs;
  }

  static Operands<Arrays> Outputs(const Problem& problem) {
    return {{"dx", Extent::kData, Set<&Arrays::dx>},
            {"dscale", Extent::kVector, Set<&Arrays::dscale>},
            {"doffset", Extent::kVector, Set<&Arrays::doffset>},
            {"dresidual", DataIf(HasResidualGradient(problem)), Set<&Arrays::dresidual>}};
  }
};

struct Inference : ForwardCall {
  static constexpr bool kTraining = false;

  static Operands<Arrays> Inputs(const Problem& problem, size_t) {
    Operands<Arrays> inputs = {{"x", Extent::kData, Set<&Arrays::x>},
                               {"scale", Extent::kVector, Set<&Arrays::scale>},
                               {"offset", Extent::kVector, Set<&Arrays::offset>},
                               {"mean", Extent::kVector, Set<&Arrays::mean>},
                               {"variance", Extent::kVector, Set<&Arrays::variance>}};
    if (problem.has_residual) inputs.push_back({"residual", Extent::kData, Set<&Arrays::residual>});
    return inputs;
  }

  static Operands<Arrays> Outputs(const Problem&) { return {{"y", Extent::kData, Set<&Arrays::y>}}; }
};

struct InferenceGrad : BackwardCall {
  static constexpr bool kTraining = false;

  static Operands<Arrays> Inputs(const Problem& problem, size_t) {
    Operands<Arrays> inputs = {
        {"dy", Extent::kData, Set<&Arrays::dy>},         {"x", Extent::kData, Set<&Arrays::x>},
        {"scale", Extent::kVector, Set<&Arrays::scale>}, {"offset", Extent::kVector, Set<&Arrays::offset>},
        {"mean", Extent::kVector, Set<&Arrays::mean>},   {"variance", Extent::kVector, Set<&Arrays::variance>}};
    if (NeedsResidual(problem)) inputs.push_back({"residual", Extent::kData, Set<&Arrays::residual>});
    return inputs;
  }

  static Operands<Arrays> Outputs(const Problem& problem) {
    return {{"dx", Extent::kData, Set<&Arrays::dx>},
            {"dscale", Extent::kVector, Set<&Arrays::dscale>},
            {"doffset", Extent::kVector, Set<&Arrays::doffset>},
            {"dmean", Extent::kVector, Set<&Arrays::dmean_in>},
            {"dvariance", Extent::kVector, Set<&Arrays::dvariance_in>},
            {"dresidual", DataIf(HasResidualGradient(problem)), Set<&Arrays::dresidual>}};
  }
};

struct BatchMoments : MomentsCall {
  static constexpr bool kTraining = true;

  static Operands<Arrays> Inputs(const Problem&, size_t count) {
    Operands<Arrays> inputs = {{"x", Extent::kData, Set<&Arrays::x>}};
    if (count > 1) inputs.push_back({"keep", Extent::kRows, SetFlags});
    return inputs;
  }

  static Operands<Arrays> Outputs(const Problem&) {
    return {{"count", Extent::kVector, Set<&Arrays::count>},
            {"mean", Extent::kVector, Set<&Arrays::mean>},
            {"variance", Extent::kVector, Set<&Arrays::variance>}};
  }
};

struct GradientMoments : GradientMomentsCall {
  static constexpr bool kTraining = false;

  static Operands<Arrays> Inputs(const Problem& problem, size_t count) { return InferenceGrad::Inputs(problem, count); }

  static Operands<Arrays> Outputs(const Problem&) {
    return {{"dscale", Extent::kVector, Set<&Arrays::dscale>},
            {"doffset", Extent::kVector, Set<&Arrays::doffset>},
            {"dmean", Extent::kVector, Set<&Arrays::dmean_in>},
            {"dvariance", Extent::kVector, Set<&Arrays::dvariance_in>}};
  }
};

struct GradientNormalize : GradientNormalizeCall {
  static constexpr bool kTraining = false;

  static Operands<Arrays> Inputs(const Problem& problem, size_t count) {
    Operands<Arrays> inputs = {{"dy", Extent::kData, Set<&Arrays::dy>},
                               {"x", Extent::kData, Set<&Arrays::x>},
                               {"scale", Extent::kVector, Set<&Arrays::scale>},
                               {"offset", Extent::kVector, Set<&Arrays::offset>},
                               {"mean", Extent::kVector, Set<&Arrays::mean>},
                               {"variance", Extent::kVector, Set<&Arrays::variance>},
                               {"tilt", Extent::kVector, SetStatistic<&StatisticsGradient::tilt>},
                               {"shift", Extent::kVector, SetStatistic<&StatisticsGradient::shift>}};
    const size_t residuals = NeedsResidual(problem) ? 1 : 0;
    if (count > inputs.size() + residuals) inputs.push_back({"keep", Extent::kRows, SetFlags});
    if (residuals > 0) inputs.push_back({"residual", Extent::kData, Set<&Arrays::residual>});
    return inputs;
  }

  static Operands<Arrays> Outputs(const Problem& problem) {
    return {{"dx", Extent::kData, Set<&Arrays::dx>},
            {"dresidual", DataIf(HasResidualGradient(problem)), Set<&Arrays::dresidual>}};
  }
};

// Calls a macro for each op, with its name and its type here.
#define TFOPS_FOR_EACH_XLA_OP(DO)               \
  DO(BatchNormTraining, Training)               \
  DO(BatchNormTrainingGrad, TrainingGrad)       \
  DO(BatchNormInference, Inference)             \
  DO(BatchNormInferenceGrad, InferenceGrad)     \
  DO(BatchNormMoments, BatchMoments)            \
  DO(BatchNormGradientMoments, GradientMoments) \
  DO(BatchNormGradientNormalize, GradientNormalize)

}  // namespace tfops

#endif  // TFOPS_XLA_OPERANDS_H_
