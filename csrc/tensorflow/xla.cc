// The ops under XLA (jit_compile=True): each becomes one custom call, on the same kernels as outside.
//
// When XLA compiles, an XlaOpKernel checks shapes, as kernels.cc does when an op runs, and emits the call: the op's
// inputs and outputs in order, all dense and row-major, and the Problem as attributes. When the compiled program runs,
// a handler (XLA's typed FFI) gets pointers in that order and the attributes back, and calls batch_norm.h on the
// program's device. Which inputs and outputs an op has, one table tells both: a new op is a new table, and a line at
// the end.
//
// A library of its own, for it needs the XLA in TensorFlow's libtensorflow_cc, which a program that only serves models
// may lack, and it takes a minute to compile.

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "csrc/tensorflow/xla_operands.h"
#include "tensorflow/compiler/tf2xla/shape_util.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "xla/ffi/api/ffi.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape_util.h"

namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();  // its header does not go together with api/ffi.h
}

// How a handler reads a Problem: names in the order of its members, and as Encode writes them.
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(tfops::DataType);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(tfops::Activation);
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(tfops::Problem, StructMember<int64_t>("outer"), StructMember<int64_t>("channels"),
                                      StructMember<int64_t>("inner"), StructMember<tfops::DataType>("dtype"),
                                      StructMember<tfops::Activation>("activation"), StructMember<bool>("has_residual"),
                                      StructMember<bool>("training"), StructMember<double>("epsilon"),
                                      StructMember<double>("exponential_avg_factor"), StructMember<bool>("unbiased"));

namespace tfops {
namespace {

namespace ffi = xla::ffi;
using tensorflow::TensorShape;

// ---------------------------------------------------------------------------------------------------------------------
// Compiling

// An MLIR dictionary. 17 digits tell a double exactly.
std::string Encode(const Problem& problem) {
  const auto flag = [](bool value) { return value ? "true" : "false"; };
  return absl::StrFormat(
      "{outer = %d : i64, channels = %d : i64, inner = %d : i64, dtype = %d : i32, activation = %d : i32, "
      "has_residual = %s, training = %s, epsilon = %.16e : f64, exponential_avg_factor = %.16e : f64, unbiased = %s}",
      problem.outer, problem.channels, problem.inner, static_cast<int>(problem.dtype),
      static_cast<int>(problem.activation), flag(problem.has_residual), flag(problem.training), problem.epsilon,
      problem.exponential_avg_factor, flag(problem.unbiased));
}

TensorShape ShapeOf(Extent extent, const TensorShape& x, const Problem& problem) {
  switch (extent) {
    case Extent::kData:
      return x;
    case Extent::kVector:
      return TensorShape({problem.channels});
    case Extent::kMask:
      return TensorShape({LayoutOfMask(problem).Bytes()});
    case Extent::kRows: {
      TensorShape rows = x;
      rows.RemoveLastDims(1);
      return rows;
    }
    case Extent::kNothing:
      break;
  }
  return TensorShape({0});
}

template <typename Op>
class XlaOp final : public tensorflow::XlaOpKernel {
 public:
  explicit XlaOp(tensorflow::OpKernelConstruction* context) : XlaOpKernel(context) {
    if (std::is_same_v<Op, BatchMoments>) {
      OP_REQUIRES_OK(context, ReadTypes(context, &attributes_));
    } else {
      OP_REQUIRES_OK(context, ReadAttributes(context, Op::kTraining, &attributes_));
    }
  }

  void Compile(tensorflow::XlaOpKernelContext* context) override { OP_REQUIRES_OK(context, Emit(context)); }

 private:
  absl::Status Emit(tensorflow::XlaOpKernelContext* context) const {
    const auto inputs = Op::Inputs(attributes_.problem, static_cast<size_t>(context->num_inputs()));
    std::vector<TensorShape> shapes(inputs.size());
    TensorShape x;
    for (size_t i = 0; i < inputs.size(); ++i) {
      TF_ASSIGN_OR_RETURN(const xla::Shape shape, context->InputXlaShape(static_cast<int>(i)));
      if (!shape.is_static()) {
        return absl::UnimplementedError(
            absl::StrCat(inputs[i].name, " has shape ", xla::ShapeUtil::HumanString(shape),
                         ", but under XLA it must have a size that is known when the program is compiled"));
      }
      TF_RETURN_IF_ERROR(tensorflow::XLAShapeToTensorShape(shape, &shapes[i]));
      if (absl::string_view(inputs[i].name) == "x") x = shapes[i];
    }
    Problem problem;
    TF_RETURN_IF_ERROR(FoldShape(x, attributes_, &problem));

    std::vector<xla::XlaOp> operands;
    std::vector<xla::Shape> operand_shapes;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const bool is_lacking = inputs[i].may_be_empty && shapes[i].num_elements() == 0;
      if (!is_lacking) TF_RETURN_IF_ERROR(CheckShape(inputs[i].name, shapes[i], ShapeOf(inputs[i].extent, x, problem)));
      operands.push_back(context->Input(static_cast<int>(i)));
      operand_shapes.push_back(DenseShape(context->input_xla_type(static_cast<int>(i)), shapes[i]));
    }
    if (std::is_same_v<Op, Training>) {
      const bool has_running = inputs.size() > 4;
      TF_RETURN_IF_ERROR(CheckRunning(problem, has_running));
    }

    const auto outputs = Op::Outputs(problem);
    std::vector<xla::Shape> output_shapes;
    for (size_t i = 0; i < outputs.size(); ++i) {
      output_shapes.push_back(
          DenseShape(context->output_xla_type(static_cast<int>(i)), ShapeOf(outputs[i].extent, x, problem)));
    }
    const xla::XlaOp call = xla::CustomCallWithLayout(
        context->builder(), type_string(), operands, xla::ShapeUtil::MakeTupleShape(output_shapes), operand_shapes,
        Encode(problem), /*has_side_effect=*/false, /*output_operand_aliasing=*/{}, /*literal=*/nullptr,
        xla::CustomCallSchedule::SCHEDULE_NONE, xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (size_t i = 0; i < outputs.size(); ++i) {
      context->SetOutput(static_cast<int>(i), xla::GetTupleElement(call, static_cast<int64_t>(i)));
    }
    return absl::OkStatus();
  }

  static xla::Shape DenseShape(xla::PrimitiveType type, const TensorShape& shape) {
    return xla::ShapeUtil::MakeShapeWithDescendingLayout(type, shape.dim_sizes());
  }

  Attributes attributes_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Running

ffi::Error ToFfi(const Status& status) {
  switch (status.code) {
    case StatusCode::kOk:
      return ffi::Error::Success();
    case StatusCode::kInvalidArgument:
      return ffi::Error::InvalidArgument(status.message);
    case StatusCode::kUnavailable:
      return ffi::Error(ffi::ErrorCode::kFailedPrecondition, status.message);
    case StatusCode::kInternal:
      break;
  }
  return ffi::Error::Internal(status.message);
}

ffi::Error NoMemory(size_t bytes) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, absl::StrCat("no memory for a workspace of ", bytes, " bytes"));
}

template <typename Op>
ffi::Error FillArrays(const Problem& problem, const ffi::RemainingArgs& arguments, const ffi::RemainingRets& results,
                      typename Op::Arrays* arrays) {
  const auto inputs = Op::Inputs(problem, arguments.size());
  const auto outputs = Op::Outputs(problem);
  if (arguments.size() != inputs.size() || results.size() != outputs.size()) {
    return ffi::Error::InvalidArgument(absl::StrCat("tfops custom call with ", arguments.size(), " operands and ",
                                                    results.size(), " results, not ", inputs.size(), " and ",
                                                    outputs.size()));
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    auto buffer = arguments.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    const bool is_lacking = inputs[i].may_be_empty && buffer->element_count() == 0;
    if (inputs[i].extent != Extent::kNothing && !is_lacking) inputs[i].set(arrays, buffer->untyped_data());
    Kept* kept = KeptOf(arrays);
    if (kept && absl::string_view(inputs[i].name) == "x") kept->length = buffer->dimensions().back();
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    auto buffer = results.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    if (outputs[i].extent != Extent::kNothing) outputs[i].set(arrays, (*buffer)->untyped_data());
  }
  return ffi::Error::Success();
}

// The workspace is allocated here, not as one more result of the call: its size is a matter of the machine that runs.
template <typename Op>
ffi::Error RunOnCpu(ffi::ThreadPool pool, const Problem& problem, ffi::RemainingArgs arguments,
                    ffi::RemainingRets results) {
  typename Op::Arrays arrays;
  if (ffi::Error error = FillArrays<Op>(problem, arguments, results, &arrays); error.failure()) return error;
  constexpr size_t kAlignment = 64;
  const size_t bytes = (Op::kCpuWorkspaceBytes(problem) + kAlignment - 1) / kAlignment * kAlignment;
  const std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(kAlignment, bytes), std::free);
  if (!workspace && bytes > 0) return NoMemory(bytes);
  const int64_t num_threads = std::max<int64_t>(pool.num_threads(), 1);  // 0 where XLA was given no pool
  const cpu::Threads threads = {static_cast<int>(num_threads) - 1,
                                [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); }};
  return ToFfi(Op::kCpu(problem, arrays, workspace.get(), threads));
}

template <typename Op>
ffi::Error RunOnCuda(void* stream, ffi::ScratchAllocator scratch, const Problem& problem, ffi::RemainingArgs arguments,
                     ffi::RemainingRets results) {
  typename Op::Arrays arrays;
  if (ffi::Error error = FillArrays<Op>(problem, arguments, results, &arrays); error.failure()) return error;
  size_t bytes = 0;
  if (const Status status = Op::kCudaWorkspaceBytes(problem, &bytes); !status.ok()) return ToFfi(status);
  void* workspace = nullptr;
  if (bytes > 0) {
    const std::optional<void*> allocated = scratch.Allocate(bytes, /*alignment=*/16);  // XLA refuses more
    if (!allocated) return NoMemory(bytes);
    workspace = *allocated;
  }
  return ToFfi(Op::kCuda(problem, arrays, workspace, stream));
}

template <typename Op>
XLA_FFI_Error* CpuHandler(XLA_FFI_CallFrame* frame) {
  static auto* const handler = ffi::Ffi::Bind()
                                   .Ctx<ffi::ThreadPool>()
                                   .Attrs<Problem>()
                                   .RemainingArgs()
                                   .RemainingRets()
                                   .To(RunOnCpu<Op>)
                                   .release();
  return handler->Call(frame);
}

// Not fit for command buffers (CUDA graphs): these would keep the workspace's address, which is another in every call.
template <typename Op>
XLA_FFI_Error* CudaHandler(XLA_FFI_CallFrame* frame) {
  static auto* const handler = ffi::Ffi::Bind()
                                   .Ctx<ffi::PlatformStream<void*>>()
                                   .Ctx<ffi::ScratchAllocator>()
                                   .Attrs<Problem>()
                                   .RemainingArgs()
                                   .RemainingRets()
                                   .To(RunOnCuda<Op>)
                                   .release();
  return handler->Call(frame);
}

// ---------------------------------------------------------------------------------------------------------------------
// Registration

// The kernels that REGISTER_XLA_OP would make, but made here: XLA looks at what that registered once, when it first
// compiles anything, and this library may be loaded later.
#define TFOPS_REGISTER_XLA_OP(name, Op, jit_device, platform, Handler)           \
  REGISTER_KERNEL_BUILDER(Name(name).Device(tensorflow::jit_device), XlaOp<Op>); \
  XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), name, platform, Handler<Op>)
#define TFOPS_REGISTER_XLA_OPS(...)                                                      \
  TFOPS_REGISTER_XLA_OP("Tfops>BatchNormTraining", Training, __VA_ARGS__);               \
  TFOPS_REGISTER_XLA_OP("Tfops>BatchNormTrainingGrad", TrainingGrad, __VA_ARGS__);       \
  TFOPS_REGISTER_XLA_OP("Tfops>BatchNormInference", Inference, __VA_ARGS__);             \
  TFOPS_REGISTER_XLA_OP("Tfops>BatchNormInferenceGrad", InferenceGrad, __VA_ARGS__);     \
  TFOPS_REGISTER_XLA_OP("Tfops>BatchNormMoments", BatchMoments, __VA_ARGS__);            \
  TFOPS_REGISTER_XLA_OP("Tfops>BatchNormGradientMoments", GradientMoments, __VA_ARGS__); \
  TFOPS_REGISTER_XLA_OP("Tfops>BatchNormGradientNormalize", GradientNormalize, __VA_ARGS__)

TFOPS_REGISTER_XLA_OPS(DEVICE_CPU_XLA_JIT, "Host", CpuHandler);
#ifdef TFOPS_WITH_CUDA
TFOPS_REGISTER_XLA_OPS(DEVICE_GPU_XLA_JIT, "CUDA", CudaHandler);
#endif

}  // namespace
}  // namespace tfops
