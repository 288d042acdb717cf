// The ops' signatures and shape functions. Names and attributes are frozen: saved models hold them.
//
// T is the data type, U the param type: float, or double with double data. [C] is a vector of x's dimension `axis`.

#include <initializer_list>
#include <string>

#include "csrc/tensorflow/problem.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace tfops {
namespace {

using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// Shape inference of one op: takes the inputs by name, and merges what is known of x's shape and of C.
class Shapes {
 public:
  Shapes(InferenceContext* context, bool training) : context_(context), training_(training) {}

  absl::Status Init() {
    TF_RETURN_IF_ERROR(ReadAttributes(context_, training_, &attributes_));
    return Locate();
  }

  // Init() for an op with no attributes but its types and its axis.
  absl::Status InitTypes() {
    TF_RETURN_IF_ERROR(ReadTypes(context_, &attributes_));
    return Locate();
  }

  // An input of x's shape.
  absl::Status Data(const char* name) {
    ShapeHandle shape;
    TF_RETURN_IF_ERROR(Input(name, &shape));
    return MergeData(name, shape);
  }

  // A list of none or one of x's shape.
  absl::Status OptionalData(const char* name) {
    std::vector<ShapeHandle> shapes;
    TF_RETURN_IF_ERROR(context_->input(name, &shapes));
    for (const ShapeHandle& shape : shapes) TF_RETURN_IF_ERROR(MergeData(name, shape));
    return absl::OkStatus();
  }

  // A vector of C elements.
  absl::Status Vector(const char* name) {
    ShapeHandle shape;
    TF_RETURN_IF_ERROR(Input(name, &shape));
    return MergeVector(name, shape);
  }

  // What is saved of a channel's statistics: a vector, or one for each virtual batch.
  absl::Status Statistics(const char* name) {
    if (attributes_.virtual_batch_size == 0) return Vector(name);
    ShapeHandle shape, matrix;
    DimensionHandle batches, channels;
    TF_RETURN_IF_ERROR(Input(name, &shape));
    if (!context_->WithRank(shape, 2, &matrix).ok() ||
        !context_->Merge(VirtualBatches(), context_->Dim(matrix, 0), &batches).ok() ||
        !context_->Merge(channels_, context_->Dim(matrix, 1), &channels).ok()) {
      return absl::InvalidArgumentError(absl::StrCat(
          name, " must have shape [", context_->DebugString(VirtualBatches()), ",", context_->DebugString(channels_),
          "], one row for each virtual batch, but it has ", context_->DebugString(shape)));
    }
    channels_ = channels;
    return absl::OkStatus();
  }

  // A list of none or two vectors; `names` are theirs, as the caller of the function knows them. Of one that may be
  // empty nothing can be said before its size is known.
  absl::Status OptionalVectors(const char* list, std::initializer_list<const char*> names, bool may_be_empty = false) {
    std::vector<ShapeHandle> shapes;
    TF_RETURN_IF_ERROR(context_->input(list, &shapes));
    for (size_t i = 0; i < shapes.size(); ++i) {
      const DimensionHandle elements = context_->NumElements(shapes[i]);
      if (may_be_empty && (!context_->ValueKnown(elements) || context_->Value(elements) == 0)) continue;
      TF_RETURN_IF_ERROR(MergeVector(names.begin()[i], shapes[i]));
    }
    return absl::OkStatus();
  }

  // A list of none or one of x's shape but for the last dimension.
  absl::Status Keep() {
    std::vector<ShapeHandle> shapes;
    TF_RETURN_IF_ERROR(context_->input("keep", &shapes));
    if (shapes.empty() || !context_->RankKnown(x_)) return absl::OkStatus();
    ShapeHandle wanted, merged;
    TF_RETURN_IF_ERROR(context_->Subshape(x_, 0, -1, &wanted));
    if (context_->Merge(wanted, shapes[0], &merged).ok()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("keep must have the shape of x without its last dimension, ",
                                                   context_->DebugString(wanted), ", but it has ",
                                                   context_->DebugString(shapes[0])));
  }

  // The shape of x, its channels known if any input told them.
  ShapeHandle DataShape() {
    if (!context_->RankKnown(x_)) return x_;
    ShapeHandle shape;
    const absl::Status status = context_->ReplaceDim(x_, attributes_.axis, channels_, &shape);
    return status.ok() ? shape : x_;
  }

  ShapeHandle VectorShape() { return context_->Vector(channels_); }

  ShapeHandle StatisticsShape() {
    if (attributes_.virtual_batch_size == 0) return VectorShape();
    return context_->Matrix(VirtualBatches(), channels_);
  }

  ShapeHandle ActivationBitsShape() {
    if (!NeedsActivationBits(attributes_.problem)) return context_->Vector(0);
    const ShapeHandle shape = DataShape();
    if (!context_->FullyDefined(shape)) return context_->Vector(context_->UnknownDim());
    Problem problem = attributes_.problem;
    std::vector<int64_t> dims;
    for (int i = 0; i < context_->Rank(shape); ++i) dims.push_back(context_->Value(context_->Dim(shape, i)));
    const int rank = static_cast<int>(dims.size());
    Status status = Fold(dims.data(), rank, attributes_.axis, &problem);
    if (status.ok()) {
      status = SetVirtualBatches(dims.data(), rank, attributes_.axis, attributes_.virtual_batch_size, &problem);
    }
    return context_->Vector(status.ok() ? context_->MakeDim(LayoutOfActivationBits(problem).Bytes())
                                        : context_->UnknownDim());
  }

  const Attributes& attributes() const { return attributes_; }

 private:
  absl::Status Locate() {
    TF_RETURN_IF_ERROR(Input("x", &x_));
    channels_ = context_->UnknownDim();
    return FindChannels("x");
  }

  // What x's shape, as far as it is known by that input, says of its channels.
  absl::Status FindChannels(const char* name) {
    if (!context_->RankKnown(x_)) return absl::OkStatus();
    const absl::Status status = CheckAxis(context_->Rank(x_), attributes_.axis);
    if (!status.ok() && name != std::string("x")) {
      return absl::InvalidArgumentError(absl::StrCat(name, " must have the shape of x, but it has ",
                                                     context_->DebugString(x_), ": ", status.message()));
    }
    TF_RETURN_IF_ERROR(status);
    DimensionHandle merged;
    if (!context_->Merge(channels_, context_->Dim(x_, attributes_.axis), &merged).ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, " must have ", context_->DebugString(channels_), " elements in dimension ",
                       attributes_.axis, ", as scale and offset do, but it has ", context_->DebugString(x_)));
    }
    channels_ = merged;
    return CheckVirtualBatches();
  }

  // Whether the batch, if it is known, can be one of virtual batches.
  absl::Status CheckVirtualBatches() {
    const DimensionHandle batch = context_->Dim(x_, 0);
    const int64_t size = attributes_.virtual_batch_size;
    const int64_t known[] = {context_->ValueKnown(batch) ? context_->Value(batch) : size};
    Problem ignored;
    return ToAbsl(SetVirtualBatches(known, context_->Rank(x_), attributes_.axis, size, &ignored));
  }

  DimensionHandle VirtualBatches() {
    if (!context_->RankKnown(x_)) return context_->UnknownDim();
    DimensionHandle batches;
    const absl::Status status =
        context_->Divide(context_->Dim(x_, 0), attributes_.virtual_batch_size, /*evenly_divisible=*/true, &batches);
    return status.ok() ? batches : context_->UnknownDim();
  }

  absl::Status Input(const char* name, ShapeHandle* shape) {
    std::vector<ShapeHandle> shapes;
    TF_RETURN_IF_ERROR(context_->input(name, &shapes));
    *shape = shapes[0];
    return absl::OkStatus();
  }

  absl::Status MergeData(const char* name, ShapeHandle shape) {
    ShapeHandle merged;
    if (!context_->Merge(x_, shape, &merged).ok()) {
      return absl::InvalidArgumentError(absl::StrCat(name, " must have the shape of x, ", context_->DebugString(x_),
                                                     ", but it has ", context_->DebugString(shape)));
    }
    x_ = merged;
    return FindChannels(name);
  }

  absl::Status MergeVector(const char* name, ShapeHandle shape) {
    ShapeHandle vector;
    DimensionHandle merged;
    if (!context_->WithRank(shape, 1, &vector).ok() ||
        !context_->Merge(channels_, context_->Dim(vector, 0), &merged).ok()) {
      return absl::InvalidArgumentError(absl::StrCat(name, " must have shape [", context_->DebugString(channels_),
                                                     "], x's dimension ", attributes_.axis, ", but it has ",
                                                     context_->DebugString(shape)));
    }
    channels_ = merged;
    return absl::OkStatus();
  }

  InferenceContext* context_;
  bool training_;
  Attributes attributes_;
  ShapeHandle x_;
  DimensionHandle channels_;
};

absl::Status TrainingShapes(InferenceContext* context) {
  Shapes shapes(context, /*training=*/true);
  TF_RETURN_IF_ERROR(shapes.Init());
  for (const char* name : {"scale", "offset"}) TF_RETURN_IF_ERROR(shapes.Vector(name));
  TF_RETURN_IF_ERROR(
      shapes.OptionalVectors("running", {"mean", "variance"}, MayLackRunning(shapes.attributes().problem)));
  TF_RETURN_IF_ERROR(shapes.OptionalData("residual"));
  context->set_output(0, shapes.DataShape());
  for (int i = 1; i <= 2; ++i) context->set_output(i, shapes.VectorShape());
  for (int i = 3; i <= 4; ++i) context->set_output(i, shapes.StatisticsShape());
  context->set_output(5, shapes.ActivationBitsShape());
  return absl::OkStatus();
}

absl::Status TrainingGradShapes(InferenceContext* context) {
  Shapes shapes(context, /*training=*/true);
  TF_RETURN_IF_ERROR(shapes.Init());
  TF_RETURN_IF_ERROR(shapes.Data("dy"));
  for (const char* name : {"scale", "offset"}) TF_RETURN_IF_ERROR(shapes.Vector(name));
  for (const char* name : {"saved_mean", "saved_inv_std"}) TF_RETURN_IF_ERROR(shapes.Statistics(name));
  TF_RETURN_IF_ERROR(shapes.OptionalVectors("drunning", {"dmean", "dvariance"}));
  TF_RETURN_IF_ERROR(shapes.OptionalData("residual"));
  context->set_output(0, shapes.DataShape());
  for (int i = 1; i <= 2; ++i) context->set_output(i, shapes.VectorShape());
  context->set_output(3, HasResidualGradient(shapes.attributes().problem) ? shapes.DataShape() : context->Vector(0));
  return absl::OkStatus();
}

absl::Status InferenceShapes(InferenceContext* context) {
  Shapes shapes(context, /*training=*/false);
  TF_RETURN_IF_ERROR(shapes.Init());
  for (const char* name : {"scale", "offset", "mean", "variance"}) TF_RETURN_IF_ERROR(shapes.Vector(name));
  TF_RETURN_IF_ERROR(shapes.OptionalData("residual"));
  context->set_output(0, shapes.DataShape());
  return absl::OkStatus();
}

absl::Status InferenceGradShapes(InferenceContext* context) {
  Shapes shapes(context, /*training=*/false);
  TF_RETURN_IF_ERROR(shapes.Init());
  TF_RETURN_IF_ERROR(shapes.Data("dy"));
  for (const char* name : {"scale", "offset", "mean", "variance"}) TF_RETURN_IF_ERROR(shapes.Vector(name));
  TF_RETURN_IF_ERROR(shapes.OptionalData("residual"));
  context->set_output(0, shapes.DataShape());
  for (int i = 1; i <= 4; ++i) context->set_output(i, shapes.VectorShape());
  context->set_output(5, HasResidualGradient(shapes.attributes().problem) ? shapes.DataShape() : context->Vector(0));
  return absl::OkStatus();
}

absl::Status MomentsShapes(InferenceContext* context) {
  Shapes shapes(context, /*training=*/true);
  TF_RETURN_IF_ERROR(shapes.InitTypes());
  TF_RETURN_IF_ERROR(shapes.Keep());
  for (int i = 0; i <= 2; ++i) context->set_output(i, shapes.VectorShape());
  return absl::OkStatus();
}

absl::Status GradientMomentsShapes(InferenceContext* context) {
  Shapes shapes(context, /*training=*/false);
  TF_RETURN_IF_ERROR(shapes.Init());
  TF_RETURN_IF_ERROR(shapes.Data("dy"));
  for (const char* name : {"scale", "offset", "mean", "variance"}) TF_RETURN_IF_ERROR(shapes.Vector(name));
  TF_RETURN_IF_ERROR(shapes.OptionalData("residual"));
  for (int i = 0; i <= 3; ++i) context->set_output(i, shapes.VectorShape());
  return absl::OkStatus();
}

absl::Status GradientNormalizeShapes(InferenceContext* context) {
  Shapes shapes(context, /*training=*/false);
  TF_RETURN_IF_ERROR(shapes.Init());
  TF_RETURN_IF_ERROR(shapes.Data("dy"));
  for (const char* name : {"scale", "offset", "mean", "variance", "tilt", "shift"}) {
    TF_RETURN_IF_ERROR(shapes.Vector(name));
  }
  TF_RETURN_IF_ERROR(shapes.Keep());
  TF_RETURN_IF_ERROR(shapes.OptionalData("residual"));
  context->set_output(0, shapes.DataShape());
  context->set_output(1, HasResidualGradient(shapes.attributes().problem) ? shapes.DataShape() : context->Vector(0));
  return absl::OkStatus();
}

}  // namespace

// epsilon and exponential_avg_factor are 32-bit attributes. Beside float64 data the _bits of each, unless they are 0,
// are those of the double that it was before it was rounded, and go before it.
#define TFOPS_COMMON_ATTRIBUTES              \
  Attr("T: {half, bfloat16, float, double}") \
      .Attr("U: {float, double}")            \
      .Attr("axis: int = -1")                \
      .Attr("epsilon: float = 0.001")        \
      .Attr("epsilon_bits: int = 0")         \
      .Attr("activation: string = ''")       \
      .Attr("num_residuals: int >= 0 = 0")

// running: nothing, or the running mean and variance. saved_mean, saved_inv_std and mask, the activation bits of
// batch_norm.h, are for the gradient alone. virtual_batch_size: the entries of dimension 0 that a virtual batch has, or
// 0 if there are none; with them, saved_mean and saved_inv_std are [virtual batches, C].
REGISTER_OP("Tfops>BatchNormTraining")
    .Input("x: T")
    .Input("scale: U")
    .Input("offset: U")
    .Input("running: num_running * U")
    .Input("residual: num_residuals * T")
    .Output("y: T")
    .Output("mean: U")
    .Output("variance: U")
    .Output("saved_mean: U")
    .Output("saved_inv_std: U")
    .Output("mask: uint8")
    .TFOPS_COMMON_ATTRIBUTES.Attr("num_running: int >= 0 = 0")
    .Attr("exponential_avg_factor: float = 1.0")
    .Attr("exponential_avg_factor_bits: int = 0")
    .Attr("unbiased: bool = true")
    .Attr("virtual_batch_size: int = 0")
    .Attr("in_place: bool = false")
    .SetShapeFn(TrainingShapes);

// drunning: nothing, or the gradients of the outputs mean and variance. residual: if the gradient needs it, as with
// silu.
// dresidual: empty if it is dy itself, or if there was no residual.
REGISTER_OP("Tfops>BatchNormTrainingGrad")
    .Input("dy: T")
    .Input("x: T")
    .Input("scale: U")
    .Input("offset: U")
    .Input("saved_mean: U")
    .Input("saved_inv_std: U")
    .Input("mask: uint8")
    .Input("drunning: num_running * U")
    .Input("residual: num_residuals * T")
    .Output("dx: T")
    .Output("dscale: U")
    .Output("doffset: U")
    .Output("dresidual: T")
    .TFOPS_COMMON_ATTRIBUTES.Attr("num_running: int >= 0 = 0")
    .Attr("exponential_avg_factor: float = 1.0")
    .Attr("exponential_avg_factor_bits: int = 0")
    .Attr("unbiased: bool = true")
    .Attr("has_residual: bool = false")
    .Attr("virtual_batch_size: int = 0")
    .Attr("in_place: bool = false")
    .SetShapeFn(TrainingGradShapes);

REGISTER_OP("Tfops>BatchNormInference")
    .Input("x: T")
    .Input("scale: U")
    .Input("offset: U")
    .Input("mean: U")
    .Input("variance: U")
    .Input("residual: num_residuals * T")
    .Output("y: T")
    .TFOPS_COMMON_ATTRIBUTES.SetShapeFn(InferenceShapes);

// residual: nothing, unless there is one and an activation. dresidual: empty if it is dy itself, or if there was no
// residual.
REGISTER_OP("Tfops>BatchNormInferenceGrad")
    .Input("dy: T")
    .Input("x: T")
    .Input("scale: U")
    .Input("offset: U")
    .Input("mean: U")
    .Input("variance: U")
    .Input("residual: num_residuals * T")
    .Output("dx: T")
    .Output("dscale: U")
    .Output("doffset: U")
    .Output("dmean: U")
    .Output("dvariance: U")
    .Output("dresidual: T")
    .TFOPS_COMMON_ATTRIBUTES.Attr("has_residual: bool = false")
    .SetShapeFn(InferenceGradShapes);

// The phases by themselves; normalize is BatchNormInference. See batch_norm.h.
//
// keep: nothing, or which rows of x's last dimension count, and get a share of the statistics' gradient.

REGISTER_OP("Tfops>BatchNormMoments")
    .Input("x: T")
    .Input("keep: num_keeps * bool")
    .Output("count: U")
    .Output("mean: U")
    .Output("variance: U")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("U: {float, double}")
    .Attr("axis: int = -1")
    .Attr("num_keeps: int >= 0 = 0")
    .SetShapeFn(MomentsShapes);

// residual: nothing, unless there is one and an activation; so also for BatchNormGradientNormalize.
REGISTER_OP("Tfops>BatchNormGradientMoments")
    .Input("dy: T")
    .Input("x: T")
    .Input("scale: U")
    .Input("offset: U")
    .Input("mean: U")
    .Input("variance: U")
    .Input("residual: num_residuals * T")
    .Output("dscale: U")
    .Output("doffset: U")
    .Output("dmean: U")
    .Output("dvariance: U")
    .TFOPS_COMMON_ATTRIBUTES.SetShapeFn(GradientMomentsShapes);

// dx = dz * scale * inv_std, and where elements count, + (x - mean) * tilt + shift. dresidual: empty without one.
REGISTER_OP("Tfops>BatchNormGradientNormalize")
    .Input("dy: T")
    .Input("x: T")
    .Input("scale: U")
    .Input("offset: U")
    .Input("mean: U")
    .Input("variance: U")
    .Input("tilt: U")
    .Input("shift: U")
    .Input("keep: num_keeps * bool")
    .Input("residual: num_residuals * T")
    .Output("dx: T")
    .Output("dresidual: T")
    .TFOPS_COMMON_ATTRIBUTES.Attr("num_keeps: int >= 0 = 0")
    .SetShapeFn(GradientNormalizeShapes);

}  // namespace tfops
