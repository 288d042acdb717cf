// The ops' kernels: they check shapes, allocate outputs, and call batch_norm.h on the op's device.

#include <cstddef>
#include <functional>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "absl/types/span.h"
#include "csrc/batch_norm/calls.h"
#include "csrc/tensorflow/problem.h"
#include "csrc/tensorflow/registration.h"
#include "tensorflow/core/framework/device_base.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/platform/threadpool.h"
#ifdef TFOPS_WITH_CUDA
#include "xla/stream_executor/stream.h"
#endif

namespace tfops {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

// ---------------------------------------------------------------------------------------------------------------------
// Devices

absl::Status AllocateWorkspace(OpKernelContext* context, size_t bytes, Tensor* workspace) {
  return context->allocate_temp(tensorflow::DT_UINT8, TensorShape({static_cast<int64_t>(bytes)}), workspace);
}

// Scratch memory of the host: on the stack where little is wanted, for small calls to be as fast as can be.
class HostWorkspace {
 public:
  absl::Status Allocate(OpKernelContext* context, size_t bytes) {
    if (bytes <= sizeof(small_)) return absl::OkStatus();
    TF_RETURN_IF_ERROR(AllocateWorkspace(context, bytes, &large_));
    data_ = large_.data();
    return absl::OkStatus();
  }

  void* data() { return data_; }

 private:
  alignas(64) std::byte small_[8 << 10];
  Tensor large_;
  void* data_ = small_;
};

// Where a call of calls.h runs, with what memory and what threads or stream.
struct CpuDevice {
  template <typename Call>
  static absl::Status Run(OpKernelContext* context, const Problem& problem, const typename Call::Arrays& arrays) {
    HostWorkspace workspace;
    TF_RETURN_IF_ERROR(workspace.Allocate(context, Call::kCpuWorkspaceBytes(problem)));
    tensorflow::thread::ThreadPool* pool = context->device()->tensorflow_cpu_worker_threads()->workers;
    const cpu::Threads threads = {pool->NumThreads() - 1,
                                  [pool](std::function<void()> task) { pool->Schedule(std::move(task)); }};
    return ToAbsl(Call::kCpu(problem, arrays, workspace.data(), threads));
  }
};

#ifdef TFOPS_WITH_CUDA
struct GpuDevice {
  template <typename Call>
  static absl::Status Run(OpKernelContext* context, const Problem& problem, const typename Call::Arrays& arrays) {
    size_t bytes = 0;
    TF_RETURN_IF_ERROR(ToAbsl(Call::kCudaWorkspaceBytes(problem, &bytes, cuda::Gpus::kCurrent)));
    Tensor workspace;
    TF_RETURN_IF_ERROR(AllocateWorkspace(context, bytes, &workspace));
    void* stream = context->op_device_context()->stream()->platform_specific_handle().stream;
    return ToAbsl(Call::kCuda(problem, arrays, workspace.data(), stream));
  }
};
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Inputs and outputs. Eager execution knows no shape functions, so every input is checked here.

// The shape of what the ops call `mask`.
TensorShape ActivationBitsShape(const Problem& problem) {
  return TensorShape({NeedsActivationBits(problem) ? LayoutOfActivationBits(problem).Bytes() : 0});
}

// Takes an op's inputs in order, each checked. (Names are for messages and lists: looking an input up takes a while.)
class Inputs {
 public:
  struct Named {
    const char* name;
    const void** data;
  };

  Inputs(OpKernelContext* context, const Tensor& x, const Problem& problem)
      : context_(context), data_shape_(x.shape()), vector_shape_({problem.channels}) {}

  absl::Status Data(const char* name, const void** data) { return Take(name, data_shape_, data); }
  absl::Status Vectors(std::initializer_list<Named> vectors) {
    for (const Named& vector : vectors) TF_RETURN_IF_ERROR(Take(vector.name, vector_shape_, vector.data));
    return absl::OkStatus();
  }
  // What is saved of statistics for the gradient.
  absl::Status Statistics(const Problem& problem, const Attributes& attributes,
                          std::initializer_list<Named> statistics) {
    const TensorShape shape = StatisticsShape(problem, attributes);
    for (const Named& each : statistics) TF_RETURN_IF_ERROR(Take(each.name, shape, each.data));
    return absl::OkStatus();
  }
  // Empty unless the problem needs them.
  absl::Status ActivationBits(const Problem& problem, const uint8_t** bits) {
    const void* data = nullptr;
    TF_RETURN_IF_ERROR(Take("mask", ActivationBitsShape(problem), &data));
    if (NeedsActivationBits(problem)) *bits = static_cast<const uint8_t*>(data);
    return absl::OkStatus();
  }

  // A list of nothing, or of what is named.
  absl::Status OptionalData(const char* name, const void** data) { return TakeList(name, data_shape_, {{name, data}}); }
  absl::Status OptionalVectors(const char* list, std::initializer_list<Named> vectors, bool may_be_empty = false) {
    return TakeList(list, vector_shape_, vectors, may_be_empty);
  }

  absl::Status Keep(Mask* mask) {
    TensorShape shape = data_shape_;
    mask->length = shape.dim_size(shape.dims() - 1);
    shape.RemoveLastDims(1);
    const void* flags = nullptr;
    TF_RETURN_IF_ERROR(TakeList("keep", shape, {{"keep", &flags}}));
    mask->flags = static_cast<const uint8_t*>(flags);
    return absl::OkStatus();
  }

  const TensorShape& data_shape() const { return data_shape_; }
  const TensorShape& vector_shape() const { return vector_shape_; }

 private:
  absl::Status Take(const char* name, const TensorShape& shape, const void** data) {
    const Tensor& tensor = context_->input(next_++);
    TF_RETURN_IF_ERROR(CheckShape(name, tensor.shape(), shape));
    *data = tensor.data();
    return absl::OkStatus();
  }

  absl::Status TakeList(const char* name, const TensorShape& shape, std::initializer_list<Named> wanted,
                        bool may_be_empty = false) {
    tensorflow::OpInputList list;
    TF_RETURN_IF_ERROR(context_->input_list(name, &list));
    for (int i = 0; i < list.size(); ++i) {
      if (may_be_empty && list[i].NumElements() == 0) {
        ++next_;
        continue;
      }
      TF_RETURN_IF_ERROR(Take(wanted.begin()[i].name, shape, wanted.begin()[i].data));
    }
    return absl::OkStatus();
  }

  OpKernelContext* context_;
  TensorShape data_shape_;
  TensorShape vector_shape_;
  int next_ = 0;
};

// Allocates outputs in order.
class Outputs {
 public:
  explicit Outputs(OpKernelContext* context) : context_(context) {}

  // One or more of a shape.
  absl::Status Allocate(const TensorShape& shape, std::initializer_list<void**> arrays) {
    for (void** data : arrays) {
      Tensor* output = nullptr;
      TF_RETURN_IF_ERROR(context_->allocate_output(next_++, shape, &output));
      *data = output->data();
    }
    return absl::OkStatus();
  }

  // One in the buffer of one of those inputs, if nobody else will read it.
  absl::Status Reuse(absl::Span<const int> inputs, const TensorShape& shape, void** data) {
    Tensor* output = nullptr;
    TF_RETURN_IF_ERROR(context_->forward_input_or_allocate_output(inputs, next_++, shape, &output));
    *data = output->data();
    return absl::OkStatus();
  }

 private:
  OpKernelContext* context_;
  int next_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------------
// Ops

class BatchNormOp : public OpKernel {
 public:
  BatchNormOp(OpKernelConstruction* context, bool training) : OpKernel(context) {
    OP_REQUIRES_OK(context, ReadAttributes(context, training, &attributes_));
  }

  void Compute(OpKernelContext* context) final { OP_REQUIRES_OK(context, Run(context)); }

 protected:
  virtual absl::Status Run(OpKernelContext* context) = 0;

  const Attributes& attributes() const { return attributes_; }

  // y, which may be in the buffer of the residual, the last input, or of x.
  static absl::Status AllocateY(OpKernelContext* context, const Inputs& inputs, const Problem& problem,
                                Outputs* outputs, void** y) {
    const int residual = context->num_inputs() - 1, x = 0;
    if (problem.has_residual) return outputs->Reuse({residual, x}, inputs.data_shape(), y);
    return outputs->Reuse({x}, inputs.data_shape(), y);
  }

 private:
  Attributes attributes_;
};

template <typename Device>
class TrainingOp final : public BatchNormOp {
 public:
  explicit TrainingOp(OpKernelConstruction* context) : BatchNormOp(context, /*training=*/true) {}

 private:
  absl::Status Run(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    Problem problem;
    TF_RETURN_IF_ERROR(FoldShape(x.shape(), attributes(), &problem));
    ForwardArrays arrays;
    Inputs inputs(context, x, problem);
    TF_RETURN_IF_ERROR(inputs.Data("x", &arrays.x));
    TF_RETURN_IF_ERROR(inputs.Vectors({{"scale", &arrays.scale}, {"offset", &arrays.offset}}));
    TF_RETURN_IF_ERROR(inputs.OptionalVectors("running", {{"mean", &arrays.mean}, {"variance", &arrays.variance}},
                                              MayLackRunning(problem)));
    TF_RETURN_IF_ERROR(inputs.OptionalData("residual", &arrays.residual));
    TF_RETURN_IF_ERROR(CheckRunning(problem, arrays.mean != nullptr));

    Outputs outputs(context);
    TF_RETURN_IF_ERROR(AllocateY(context, inputs, problem, &outputs, &arrays.y));
    TF_RETURN_IF_ERROR(outputs.Allocate(inputs.vector_shape(), {&arrays.mean_out, &arrays.variance_out}));
    TF_RETURN_IF_ERROR(
        outputs.Allocate(StatisticsShape(problem, attributes()), {&arrays.saved_mean, &arrays.saved_inv_std}));
    void* bits = nullptr;
    TF_RETURN_IF_ERROR(outputs.Allocate(ActivationBitsShape(problem), {&bits}));
    if (NeedsActivationBits(problem)) arrays.activation_bits = static_cast<uint8_t*>(bits);
    return Device::template Run<ForwardCall>(context, problem, arrays);
  }
};

template <typename Device>
class InferenceOp final : public BatchNormOp {
 public:
  explicit InferenceOp(OpKernelConstruction* context) : BatchNormOp(context, /*training=*/false) {}

 private:
  absl::Status Run(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    Problem problem;
    TF_RETURN_IF_ERROR(FoldShape(x.shape(), attributes(), &problem));
    ForwardArrays arrays;
    Inputs inputs(context, x, problem);
    TF_RETURN_IF_ERROR(inputs.Data("x", &arrays.x));
    TF_RETURN_IF_ERROR(inputs.Vectors({{"scale", &arrays.scale},
                                       {"offset", &arrays.offset},
                                       {"mean", &arrays.mean},
                                       {"variance", &arrays.variance}}));
    TF_RETURN_IF_ERROR(inputs.OptionalData("residual", &arrays.residual));

    Outputs outputs(context);
    TF_RETURN_IF_ERROR(AllocateY(context, inputs, problem, &outputs, &arrays.y));
    return Device::template Run<ForwardCall>(context, problem, arrays);
  }
};

// What all gradient ops take first: dy, x, and the vectors that z depends on.
absl::Status TakeGradientInputs(const Problem& problem, const Attributes& attributes, Inputs* inputs,
                                BackwardArrays* arrays) {
  TF_RETURN_IF_ERROR(inputs->Data("dy", &arrays->dy));
  TF_RETURN_IF_ERROR(inputs->Data("x", &arrays->x));
  TF_RETURN_IF_ERROR(inputs->Vectors({{"scale", &arrays->scale}, {"offset", &arrays->offset}}));
  if (problem.training) {
    return inputs->Statistics(problem, attributes,
                              {{"saved_mean", &arrays->mean}, {"saved_inv_std", &arrays->inv_std}});
  }
  return inputs->Vectors({{"mean", &arrays->mean}, {"variance", &arrays->variance}});
}

// What all gradient ops that write dx allocate: dx in dy's buffer, the vectors, and dresidual.
absl::Status AllocateGradients(Outputs* outputs, const Inputs& inputs, const Problem& problem,
                               std::initializer_list<void**> vectors, BackwardArrays* arrays) {
  TF_RETURN_IF_ERROR(outputs->Reuse({0}, inputs.data_shape(), &arrays->dx));
  TF_RETURN_IF_ERROR(outputs->Allocate(inputs.vector_shape(), vectors));
  const bool wanted = HasResidualGradient(problem);
  void* dresidual = nullptr;
  TF_RETURN_IF_ERROR(outputs->Allocate(wanted ? inputs.data_shape() : TensorShape({0}), {&dresidual}));
  if (wanted) arrays->dresidual = dresidual;
  return absl::OkStatus();
}

template <typename Device>
class TrainingGradOp final : public BatchNormOp {
 public:
  explicit TrainingGradOp(OpKernelConstruction* context) : BatchNormOp(context, /*training=*/true) {}

 private:
  absl::Status Run(OpKernelContext* context) override {
    const Tensor& x = context->input(1);
    Problem problem;
    TF_RETURN_IF_ERROR(FoldShape(x.shape(), attributes(), &problem));
    BackwardArrays arrays;
    Inputs inputs(context, x, problem);
    TF_RETURN_IF_ERROR(TakeGradientInputs(problem, attributes(), &inputs, &arrays));
    TF_RETURN_IF_ERROR(inputs.ActivationBits(problem, &arrays.activation_bits));
    TF_RETURN_IF_ERROR(
        inputs.OptionalVectors("drunning", {{"dmean", &arrays.dmean}, {"dvariance", &arrays.dvariance}}));
    TF_RETURN_IF_ERROR(inputs.OptionalData("residual", &arrays.residual));

    Outputs outputs(context);
    TF_RETURN_IF_ERROR(AllocateGradients(&outputs, inputs, problem, {&arrays.dscale, &arrays.doffset}, &arrays));
    return Device::template Run<BackwardCall>(context, problem, arrays);
  }
};

// The gradient where the statistics were given: BackwardCall, or a phase of it, GradientMomentsCall for the vectors
// alone, or GradientNormalizeCall for dx and dresidual alone.
template <typename Device, typename Call>
class InferenceGradOp final : public BatchNormOp {
 public:
  explicit InferenceGradOp(OpKernelConstruction* context) : BatchNormOp(context, /*training=*/false) {}

 private:
  absl::Status Run(OpKernelContext* context) override {
    const Tensor& x = context->input(1);
    Problem problem;
    TF_RETURN_IF_ERROR(FoldShape(x.shape(), attributes(), &problem));
    typename Call::Arrays arrays;
    Inputs inputs(context, x, problem);
    TF_RETURN_IF_ERROR(TakeGradientInputs(problem, attributes(), &inputs, &arrays));
    if constexpr (std::is_same_v<Call, GradientNormalizeCall>) {
      StatisticsGradient& statistics = arrays.statistics;
      TF_RETURN_IF_ERROR(inputs.Vectors({{"tilt", &statistics.tilt}, {"shift", &statistics.shift}}));
      TF_RETURN_IF_ERROR(inputs.Keep(&statistics.mask));
    }
    TF_RETURN_IF_ERROR(inputs.OptionalData("residual", &arrays.residual));

    Outputs outputs(context);
    const auto vectors = {&arrays.dscale, &arrays.doffset, &arrays.dmean_in, &arrays.dvariance_in};
    if (std::is_same_v<Call, GradientMomentsCall>) {
      TF_RETURN_IF_ERROR(outputs.Allocate(inputs.vector_shape(), vectors));
    } else if (std::is_same_v<Call, GradientNormalizeCall>) {
      TF_RETURN_IF_ERROR(AllocateGradients(&outputs, inputs, problem, {}, &arrays));
    } else {
      TF_RETURN_IF_ERROR(AllocateGradients(&outputs, inputs, problem, vectors, &arrays));
    }
    return Device::template Run<Call>(context, problem, arrays);
  }
};

template <typename Device>
class MomentsOp final : public OpKernel {
 public:
  explicit MomentsOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, ReadTypes(context, &attributes_));
  }

  void Compute(OpKernelContext* context) override { OP_REQUIRES_OK(context, Run(context)); }

 private:
  absl::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    Problem problem;
    TF_RETURN_IF_ERROR(FoldShape(x.shape(), attributes_, &problem));
    MomentsArrays arrays;
    Inputs inputs(context, x, problem);
    TF_RETURN_IF_ERROR(inputs.Data("x", &arrays.x));
    TF_RETURN_IF_ERROR(inputs.Keep(&arrays.mask));

    Outputs outputs(context);
    TF_RETURN_IF_ERROR(outputs.Allocate(inputs.vector_shape(), {&arrays.count, &arrays.mean, &arrays.variance}));
    return Device::template Run<MomentsCall>(context, problem, arrays);
  }

  Attributes attributes_;
};

template <typename Device>
void RegisterKernels(const char* device) {
  using tensorflow::DT_BFLOAT16, tensorflow::DT_DOUBLE, tensorflow::DT_FLOAT, tensorflow::DT_HALF;
  for (const tensorflow::DataType type : {DT_HALF, DT_BFLOAT16, DT_FLOAT, DT_DOUBLE}) {
    RegisterKernel<TrainingOp<Device>>("Tfops>BatchNormTraining", device, type);
    RegisterKernel<TrainingGradOp<Device>>("Tfops>BatchNormTrainingGrad", device, type);
    RegisterKernel<InferenceOp<Device>>("Tfops>BatchNormInference", device, type);
    RegisterKernel<InferenceGradOp<Device, BackwardCall>>("Tfops>BatchNormInferenceGrad", device, type);
    RegisterKernel<MomentsOp<Device>>("Tfops>BatchNormMoments", device, type);
    RegisterKernel<InferenceGradOp<Device, GradientMomentsCall>>("Tfops>BatchNormGradientMoments", device, type);
    RegisterKernel<InferenceGradOp<Device, GradientNormalizeCall>>("Tfops>BatchNormGradientNormalize", device, type);
  }
}

// The kernels are registered when the library is loaded.
[[maybe_unused]] const bool registered = [] {
  RegisterKernels<CpuDevice>(tensorflow::DEVICE_CPU);
#ifdef TFOPS_WITH_CUDA
  if (!IsDriverTooOld()) RegisterKernels<GpuDevice>(tensorflow::DEVICE_GPU);
#endif
  return true;
}();

}  // namespace
}  // namespace tfops
