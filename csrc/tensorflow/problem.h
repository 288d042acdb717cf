// Turns an op's attributes into a Problem, for the shape functions and the kernels; and a Status into an absl::Status.

#ifndef TFOPS_TENSORFLOW_PROBLEM_H_
#define TFOPS_TENSORFLOW_PROBLEM_H_

#include <cstring>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "csrc/batch_norm/batch_norm.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/framework/types.h"
#include "tensorflow/core/platform/errors.h"

namespace tfops {

inline absl::Status ToAbsl(const Status& status) {
  switch (status.code) {
    case StatusCode::kOk:
      return absl::OkStatus();
    case StatusCode::kInvalidArgument:
      return absl::InvalidArgumentError(status.message);
    case StatusCode::kUnavailable:
      return absl::FailedPreconditionError(status.message);
    case StatusCode::kInternal:
      break;
  }
  return absl::InternalError(status.message);
}

struct Attributes {
  Problem problem;  // but for its sizes
  int64_t axis = -1;
  int64_t virtual_batch_size = 0;
};

// Checks of the kernels. Shape functions made them too, but only where shapes were known.

inline absl::Status CheckShape(const char* name, const tensorflow::TensorShape& shape,
                               const tensorflow::TensorShape& wanted) {
  if (shape == wanted) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " must have shape ", wanted.DebugString(), ", but it has ", shape.DebugString()));
}

inline absl::Status FoldShape(const tensorflow::TensorShape& x, const Attributes& attributes, Problem* problem) {
  *problem = attributes.problem;
  const auto dims = x.dim_sizes();
  TF_RETURN_IF_ERROR(ToAbsl(Fold(dims.data(), x.dims(), attributes.axis, problem)));
  return ToAbsl(SetVirtualBatches(dims.data(), x.dims(), attributes.axis, attributes.virtual_batch_size, problem));
}

// Of saved_mean and saved_inv_std.
inline tensorflow::TensorShape StatisticsShape(const Problem& problem, const Attributes& attributes) {
  if (attributes.virtual_batch_size == 0) return tensorflow::TensorShape({problem.channels});
  return tensorflow::TensorShape({problem.virtual_batches, problem.channels});
}

inline absl::Status CheckRunning(const Problem& problem, bool has_running) {
  if (has_running || problem.channels == 0 || MayLackRunning(problem)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("mean and variance must be given where exponential_avg_factor != 1, but they are not, and that is ",
                   problem.exponential_avg_factor));
}

inline absl::Status CheckAxis(int rank, int64_t axis) {
  // Fold knows the rule; the sizes do not matter to it.
  const std::vector<int64_t> ones(static_cast<size_t>(rank), 1);
  Problem ignored;
  return ToAbsl(Fold(ones.data(), rank, axis, &ignored));
}

// Reads and checks the types and the axis of an op. Context is an OpKernelConstruction or an InferenceContext.
template <typename Context>
absl::Status ReadTypes(Context* context, Attributes* attributes) {
  Problem& problem = attributes->problem;
  tensorflow::DataType data_type, param_type;
  TF_RETURN_IF_ERROR(context->GetAttr("T", &data_type));
  TF_RETURN_IF_ERROR(context->GetAttr("U", &param_type));
  switch (data_type) {
    case tensorflow::DT_HALF:
      problem.dtype = DataType::kFloat16;
      break;
    case tensorflow::DT_BFLOAT16:
      problem.dtype = DataType::kBFloat16;
      break;
    case tensorflow::DT_FLOAT:
      problem.dtype = DataType::kFloat32;
      break;
    default:
      problem.dtype = DataType::kFloat64;
      break;
  }
  const tensorflow::DataType wanted = data_type == tensorflow::DT_DOUBLE ? tensorflow::DT_DOUBLE : tensorflow::DT_FLOAT;
  if (param_type != wanted) {
    return absl::InvalidArgumentError(
        absl::StrCat("scale, offset and statistics must be ", tensorflow::DataTypeString(wanted), " where x is ",
                     tensorflow::DataTypeString(data_type), ", but they are ", tensorflow::DataTypeString(param_type)));
  }

  int64_t num_keeps = 0;
  if (context->GetAttr("num_keeps", &num_keeps).ok() && num_keeps > 1) {
    return absl::InvalidArgumentError(absl::StrCat("num_keeps must be 0 or 1, but it is ", num_keeps));
  }
  return context->GetAttr("axis", &attributes->axis);
}

// Reads a double: from the float attribute of that name, or from its bits in the attribute `name`_bits, if that is not
// 0.
template <typename Context>
absl::Status ReadDouble(Context* context, const std::string& name, double* value) {
  float rounded = 0;
  int64_t bits = 0;
  TF_RETURN_IF_ERROR(context->GetAttr(name, &rounded));
  TF_RETURN_IF_ERROR(context->GetAttr(name + "_bits", &bits));
  *value = rounded;
  if (bits != 0) std::memcpy(value, &bits, sizeof(bits));
  return absl::OkStatus();
}

// Reads and checks all attributes.
template <typename Context>
absl::Status ReadAttributes(Context* context, bool training, Attributes* attributes) {
  TF_RETURN_IF_ERROR(ReadTypes(context, attributes));
  Problem& problem = attributes->problem;
  problem.training = training;
  TF_RETURN_IF_ERROR(ReadDouble(context, "epsilon", &problem.epsilon));
  std::string activation;
  TF_RETURN_IF_ERROR(context->GetAttr("activation", &activation));
  TF_RETURN_IF_ERROR(ToAbsl(ParseActivation(activation, &problem)));
  if (training) {
    TF_RETURN_IF_ERROR(ReadDouble(context, "exponential_avg_factor", &problem.exponential_avg_factor));
    TF_RETURN_IF_ERROR(context->GetAttr("unbiased", &problem.unbiased));
    TF_RETURN_IF_ERROR(context->GetAttr("in_place", &problem.in_place));
    int64_t num_running = 0;
    TF_RETURN_IF_ERROR(context->GetAttr("num_running", &num_running));
    if (num_running != 0 && num_running != 2) {
      return absl::InvalidArgumentError(
          absl::StrCat("num_running must be 0, or 2 for mean and variance, but it is ", num_running));
    }
    TF_RETURN_IF_ERROR(context->GetAttr("virtual_batch_size", &attributes->virtual_batch_size));
    if (attributes->virtual_batch_size < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("virtual_batch_size must be > 0, or 0 for none, but it is ", attributes->virtual_batch_size));
    }
    if (problem.in_place && attributes->virtual_batch_size != 0) {
      return absl::InvalidArgumentError("in_place must be False where there are virtual batches, but it is True");
    }
  }
  TF_RETURN_IF_ERROR(ToAbsl(Validate(problem)));

  int64_t num_residuals = 0;
  TF_RETURN_IF_ERROR(context->GetAttr("num_residuals", &num_residuals));
  if (num_residuals > 1) {
    return absl::InvalidArgumentError(absl::StrCat("num_residuals must be 0 or 1, but it is ", num_residuals));
  }
  // Gradient ops have has_residual, and take the residual itself only where they need it.
  if (context->GetAttr("has_residual", &problem.has_residual).ok()) {
    const int64_t needed = NeedsResidual(problem) ? 1 : 0;
    if (num_residuals != needed) {
      return absl::InvalidArgumentError(absl::StrCat(
          "num_residuals must be ", needed, " with this activation and has_residual, but it is ", num_residuals));
    }
  } else {
    problem.has_residual = num_residuals == 1;
  }
  return absl::OkStatus();
}

}  // namespace tfops

#endif  // TFOPS_TENSORFLOW_PROBLEM_H_
