// The handlers of the custom calls, by XLA's typed FFI: what runs when a compiled program comes to one. They know XLA
// by api/ffi.h alone, which TensorFlow and JAX both have, and serve both.
//
// A call's operands and results are those of operands.h, all dense and row-major, and behind the results a workspace,
// so that XLA allocates it with all else: bytes, of the size that WorkspaceBytes() says when the program is compiled.
// XLA aligns it to 64 bytes on the CPU, to 128 on a GPU. The attributes are the Problem.

#ifndef TFOPS_XLA_HANDLERS_H_
#define TFOPS_XLA_HANDLERS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>

#include "csrc/xla/operands.h"
#include "xla/ffi/api/ffi.h"

// How a handler reads a Problem: names in the order of its members.
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(tfops::DataType);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(tfops::Activation);
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(tfops::Problem, StructMember<int64_t>("outer"), StructMember<int64_t>("channels"),
                                      StructMember<int64_t>("inner"), StructMember<tfops::DataType>("dtype"),
                                      StructMember<tfops::Activation>("activation"),
                                      StructMember<double>("negative_slope"), StructMember<double>("max_value"),
                                      StructMember<double>("threshold"), StructMember<double>("alpha"),
                                      StructMember<bool>("has_residual"), StructMember<bool>("training"),
                                      StructMember<double>("epsilon"), StructMember<double>("exponential_avg_factor"),
                                      StructMember<bool>("unbiased"), StructMember<int64_t>("virtual_batches"),
                                      StructMember<bool>("in_place"));

namespace tfops {

namespace ffi = xla::ffi;

// Where a program runs. WorkspaceBytes() is batch_norm.h's; a compiler asks for cuda::Gpus::kAny.
struct Cpu {
  template <typename Op>
  static Status WorkspaceBytes(const Problem& problem, size_t* bytes, cuda::Gpus) {
    *bytes = Op::kCpuWorkspaceBytes(problem);
    return {};
  }
};

struct Cuda {
  template <typename Op>
  static Status WorkspaceBytes(const Problem& problem, size_t* bytes, cuda::Gpus gpus) {
    return Op::kCudaWorkspaceBytes(problem, bytes, gpus);
  }
};

inline ffi::Error ToFfi(const Status& status) {
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

// What a call has: arrays, and a workspace that is large enough.
template <typename Device, typename Op>
ffi::Error Unpack(const Problem& problem, const ffi::RemainingArgs& arguments, const ffi::RemainingRets& results,
                  typename Op::Arrays* arrays, void** workspace) {
  const auto inputs = Op::Inputs(problem, arguments.size());
  const auto outputs = Op::Outputs(problem);
  if (arguments.size() != inputs.size() || results.size() != outputs.size() + 1) {
    return ffi::Error::InvalidArgument("tfops custom call with " + std::to_string(arguments.size()) + " operands and " +
                                       std::to_string(results.size()) + " results, not " +
                                       std::to_string(inputs.size()) + " and " + std::to_string(outputs.size() + 1));
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    auto buffer = arguments.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    const bool is_lacking = inputs[i].may_be_empty && buffer->element_count() == 0;
    if (inputs[i].extent != Extent::kNothing && !is_lacking) inputs[i].set(arrays, buffer->untyped_data());
    Mask* mask = MaskOf(arrays);
    if (mask && std::string_view(inputs[i].name) == "x") mask->length = buffer->dimensions().back();
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    auto buffer = results.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    if (outputs[i].extent != Extent::kNothing) outputs[i].set(arrays, (*buffer)->untyped_data());
  }

  auto buffer = results.get<ffi::AnyBuffer>(outputs.size());
  if (buffer.has_error()) return buffer.error();
  *workspace = (*buffer)->untyped_data();
  size_t needed = 0;
  const Status status = Device::template WorkspaceBytes<Op>(problem, &needed, cuda::Gpus::kCurrent);
  if (!status.ok()) return ToFfi(status);
  if ((*buffer)->size_bytes() < needed) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                      "the program was compiled with " + std::to_string((*buffer)->size_bytes()) +
                          " bytes of workspace for tfops, but this machine needs " + std::to_string(needed) +
                          ": compile it on the machine that runs it, with the same environment variables");
  }
  return ffi::Error::Success();
}

template <typename Op>
ffi::Error RunOnCpu(ffi::ThreadPool pool, const Problem& problem, ffi::RemainingArgs arguments,
                    ffi::RemainingRets results) {
  typename Op::Arrays arrays;
  void* workspace = nullptr;
  if (ffi::Error error = Unpack<Cpu, Op>(problem, arguments, results, &arrays, &workspace); error.failure())
    return error;
  const int64_t num_threads = std::max<int64_t>(pool.num_threads(), 1);  // 0 where XLA was given no pool
  const cpu::Threads threads = {static_cast<int>(num_threads) - 1,
                                [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); }};
  return ToFfi(Op::kCpu(problem, arrays, workspace, threads));
}

template <typename Op>
ffi::Error RunOnCuda(void* stream, const Problem& problem, ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  typename Op::Arrays arrays;
  void* workspace = nullptr;
  if (ffi::Error error = Unpack<Cuda, Op>(problem, arguments, results, &arrays, &workspace); error.failure())
    return error;
  return ToFfi(Op::kCuda(problem, arrays, workspace, stream));
}

// Does all that could be in the way of a capture, before a program runs.
template <typename Op>
ffi::Error PrepareCuda(const Problem& problem, ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  const cuda::Rehearsal rehearsal;
  if (arguments.size() == 0) return ToFfi(Op::kCuda(problem, {}, nullptr, nullptr));  // XLA may have no addresses yet
  return RunOnCuda<Op>(nullptr, problem, arguments, results);
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

// The handler on a GPU, which may become part of a command buffer (a CUDA graph): XLA captures what it launches, and
// launches that again with the same addresses. It neither allocates nor synchronizes.
template <typename Op>
XLA_FFI_Error* CudaHandler(XLA_FFI_CallFrame* frame) {
  static auto* const handler = ffi::Ffi::Bind()
                                   .Ctx<ffi::PlatformStream<void*>>()
                                   .Attrs<Problem>()
                                   .RemainingArgs()
                                   .RemainingRets()
                                   .To(RunOnCuda<Op>, {ffi::Traits::kCmdBufferCompatible})
                                   .release();
  return handler->Call(frame);
}

// The handler for the stage that XLA calls initialize.
template <typename Op>
XLA_FFI_Error* CudaPreparer(XLA_FFI_CallFrame* frame) {
  static auto* const handler = ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
                                   .Attrs<Problem>()
                                   .RemainingArgs()
                                   .RemainingRets()
                                   .To(PrepareCuda<Op>, {ffi::Traits::kCmdBufferCompatible})
                                   .release();
  return handler->Call(frame);
}

}  // namespace tfops

#endif  // TFOPS_XLA_HANDLERS_H_
