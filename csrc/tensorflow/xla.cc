// The ops under XLA (jit_compile=True): each becomes one custom call, on the same kernels as outside.
//
// When XLA compiles, an XlaOpKernel checks shapes, as kernels.cc does when an op runs, and emits the call: the op's
// inputs and outputs in order, all dense and row-major, a workspace behind the outputs, and the Problem as attributes.
// When the compiled program runs, a handler (csrc/xla/handlers.h) gets pointers in that order and the attributes back,
// and calls batch_norm.h on the program's device. Which inputs and outputs an op has, one table (csrc/xla/operands.h)
// tells both.
//
// A library of its own, for it needs the XLA in TensorFlow's libtensorflow_cc, which a program that only serves models
// may lack, and it takes a minute to compile.

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/base/casts.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "csrc/tensorflow/problem.h"
#include "csrc/xla/handlers.h"
#include "tensorflow/compiler/tf2xla/shape_util.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape_util.h"

namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();  // its header does not go together with api/ffi.h
}

namespace tfops {
namespace {

using tensorflow::TensorShape;

// ---------------------------------------------------------------------------------------------------------------------
// Compiling

// An MLIR dictionary, as handlers.h reads it.
std::string Encode(const Problem& problem) {
  const auto flag = [](bool value) { return value ? "true" : "false"; };
  // By its bits, which MLIR takes for infinity too.
  const auto number = [](double value) { return absl::StrFormat("0x%016X : f64", absl::bit_cast<uint64_t>(value)); };
  return absl::StrFormat(
      "{outer = %d : i64, channels = %d : i64, inner = %d : i64, dtype = %d : i32, activation = %d : i32, "
      "negative_slope = %s, max_value = %s, threshold = %s, alpha = %s, has_residual = %s, training = %s, "
      "epsilon = %s, exponential_avg_factor = %s, unbiased = %s, virtual_batches = %d : i64, in_place = %s}",
      problem.outer, problem.channels, problem.inner, static_cast<int>(problem.dtype),
      static_cast<int>(problem.activation), number(problem.negative_slope), number(problem.max_value),
      number(problem.threshold), number(problem.alpha), flag(problem.has_residual), flag(problem.training),
      number(problem.epsilon), number(problem.exponential_avg_factor), flag(problem.unbiased), problem.virtual_batches,
      flag(problem.in_place));
}

TensorShape ShapeOf(Extent extent, const TensorShape& x, const Problem& problem, const Attributes& attributes) {
  switch (extent) {
    case Extent::kData:
      return x;
    case Extent::kVector:
      return TensorShape({problem.channels});
    case Extent::kStatistics:
      return StatisticsShape(problem, attributes);
    case Extent::kActivationBits:
      return TensorShape({LayoutOfActivationBits(problem).Bytes()});
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

using Aliasing = std::vector<std::pair<xla::ShapeIndex, std::pair<int64_t, xla::ShapeIndex>>>;

// What puts y in x's buffer: inference without a gradient, which tfops/_gradients.py tells. To XLA that is an order,
// not an offer: where x is needed later, or is the program's own input, it would copy x first. For the same reason dx
// does not take dy's buffer, which XLA would copy in networks with shortcuts.
Aliasing AliasingOf(const xla::XlaOp& x, bool has_gradient) {
  using Friend = xla::internal::XlaBuilderFriend;
  const auto* producer = Friend::GetInstruction(x);
  while (producer->opcode() == "reshape") {  // an input is one, for TensorFlow
    producer = Friend::GetInstructionByHandle(x.builder(), producer->operand_ids(0));
  }
  if (has_gradient || producer->opcode() == "parameter") return {};
  return {{{0}, {0, {}}}};
}

template <typename Op, typename Device>
class XlaOp final : public tensorflow::XlaOpKernel {
 public:
  explicit XlaOp(tensorflow::OpKernelConstruction* context) : XlaOpKernel(context) {
    if (std::is_same_v<Op, BatchMoments>) {
      OP_REQUIRES_OK(context, ReadTypes(context, &attributes_));
    } else {
      OP_REQUIRES_OK(context, ReadAttributes(context, Op::kTraining, &attributes_));
    }
    has_gradient_ = context->HasAttr("_tfops_has_gradient");
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
      if (!is_lacking)
        TF_RETURN_IF_ERROR(CheckShape(inputs[i].name, shapes[i], ShapeOf(inputs[i].extent, x, problem, attributes_)));
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
      output_shapes.push_back(DenseShape(context->output_xla_type(static_cast<int>(i)),
                                         ShapeOf(outputs[i].extent, x, problem, attributes_)));
    }
    size_t workspace_bytes = 0;
    TF_RETURN_IF_ERROR(ToAbsl(Device::template WorkspaceBytes<Op>(problem, &workspace_bytes, cuda::Gpus::kAny)));
    output_shapes.push_back(DenseShape(xla::U8, TensorShape({static_cast<int64_t>(workspace_bytes)})));
    const xla::XlaOp call = xla::CustomCallWithLayout(
        context->builder(), type_string(), operands, xla::ShapeUtil::MakeTupleShape(output_shapes), operand_shapes,
        Encode(problem), /*has_side_effect=*/false,
        std::is_same_v<Op, Inference> ? AliasingOf(operands[0], has_gradient_) : Aliasing(), /*literal=*/nullptr,
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
  bool has_gradient_ = false;
};

// ---------------------------------------------------------------------------------------------------------------------
// Registration

// The kernels that REGISTER_XLA_OP would make, but made here: XLA looks at what that registered once, when it first
// compiles anything, and this library may be loaded later.
#define TFOPS_REGISTER_ON_CPU(name, Op)                                                                 \
  REGISTER_KERNEL_BUILDER(Name("Tfops>" #name).Device(tensorflow::DEVICE_CPU_XLA_JIT), XlaOp<Op, Cpu>); \
  XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "Tfops>" #name, "Host", CpuHandler<Op>);
#define TFOPS_REGISTER_ON_CUDA(name, Op)                                                                 \
  REGISTER_KERNEL_BUILDER(Name("Tfops>" #name).Device(tensorflow::DEVICE_GPU_XLA_JIT), XlaOp<Op, Cuda>); \
  XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "Tfops>" #name, "CUDA",                                  \
                           XLA_FFI_Handler_Bundle{nullptr, nullptr, CudaPreparer<Op>, CudaHandler<Op>});

TFOPS_FOR_EACH_XLA_OP(TFOPS_REGISTER_ON_CPU)
#ifdef TFOPS_WITH_CUDA
TFOPS_FOR_EACH_XLA_OP(TFOPS_REGISTER_ON_CUDA)
#endif

}  // namespace
}  // namespace tfops
