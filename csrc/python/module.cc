// The contract of batch_norm.h, as it is, for Python: structs with their fields, pointers as integers.
// What makes it convenient and safe is in tfops_kernels/__init__.py.

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/calls.h"

#ifdef TFOPS_SIMT
#include "csrc/simt/controls.h"
#endif

namespace py = pybind11;

namespace tfops {
namespace {

void ThrowUnlessOk(const Status& status) {
  if (status.ok()) return;
  if (status.code == StatusCode::kInvalidArgument) throw py::value_error(status.message);
  throw std::runtime_error(status.message);
}

// A pointer member of any type, seen as an integer.
template <typename Struct, typename T>
void DefinePointer(py::class_<Struct>& type, const char* name, T* Struct::* member) {
  type.def_property(
      name, [member](const Struct& self) { return reinterpret_cast<uintptr_t>(self.*member); },
      [member](Struct& self, uintptr_t address) { self.*member = reinterpret_cast<T*>(address); });
}

// A property of a GPU. Once it is set, the GPU is no longer the one that CUDA can be asked about.
template <typename T>
void DefineDeviceProperty(py::class_<cuda::Device>& type, const char* name, T cuda::Device::* member) {
  type.def_property(
      name, [member](const cuda::Device& self) { return self.*member; },
      [member](cuda::Device& self, T value) {
        self.*member = value;
        self.number = -1;
      });
}

py::dict OccupancyForPython(DataType dtype, bool backward, const cuda::Device& device) {
  cuda::Occupancy occupancy;
  ThrowUnlessOk(cuda::DescribeOccupancy(device, dtype, backward, &occupancy));
  py::dict clusters;
  for (size_t s = 0; s < std::size(occupancy.clusters); ++s) {
    clusters[py::int_(cuda::Occupancy::kClusters[s])] = occupancy.clusters[s];
  }
  return py::dict(py::arg("asked") = occupancy.asked, py::arg("static_shared_bytes") = occupancy.static_bytes,
                  py::arg("room") = occupancy.room, py::arg("blocks") = occupancy.blocks,
                  py::arg("clusters") = clusters);
}

py::dict LaunchesForPython() {
  const cuda::Launches launches = cuda::GetLaunches();
  py::list refusals;
  for (const cuda::Refusal& refusal : launches.refusals) {
    py::dict entry;
    entry["tier"] = refusal.tier;
    entry["pass"] = refusal.pass;
    entry["error"] = refusal.error;
    entry["problem"] = refusal.problem;
    entry["count"] = refusal.count;
    refusals.append(entry);
  }
  return py::dict(py::arg("calls") = launches.calls, py::arg("refusals") = refusals);
}

py::dict PolicySettingsForPython() {
  const cuda::PolicySettings settings = cuda::GetPolicySettings();
  return py::dict(py::arg("tier") = settings.tier, py::arg("cluster") = settings.cluster,
                  py::arg("free_multiprocessors") = settings.free_multiprocessors, py::arg("tuning") = settings.tuning);
}

// Changes settings; what is not given stays as it is.
void SetPolicySettings(std::optional<std::string> tier, std::optional<int> cluster,
                       std::optional<int> free_multiprocessors, const std::map<std::string, double>& tuning) {
  cuda::PolicySettings settings = cuda::GetPolicySettings();
  if (tier) settings.tier = *tier;
  if (cluster) settings.cluster = *cluster;
  if (free_multiprocessors) settings.free_multiprocessors = *free_multiprocessors;
  for (const auto& [name, value] : tuning) settings.tuning[name] = value;
  ThrowUnlessOk(cuda::SetPolicySettings(settings));
}

// Threads for one call: started as it asks for them, joined when this goes.
class CallThreads {
 public:
  explicit CallThreads(int threads) : helpers_(threads - 1) {}
  ~CallThreads() {
    for (std::thread& thread : started_) thread.join();
  }
  CallThreads(const CallThreads&) = delete;
  CallThreads& operator=(const CallThreads&) = delete;

  cpu::Threads Get() {
    return {helpers_, [this](std::function<void()> task) { started_.emplace_back(std::move(task)); }};
  }

 private:
  int helpers_;
  std::vector<std::thread> started_;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

std::unique_ptr<void, Free> AllocateAligned(size_t bytes) {
  constexpr size_t kAlignment = 64;
  std::unique_ptr<void, Free> memory(std::aligned_alloc(kAlignment, (bytes / kAlignment + 1) * kAlignment));
  if (!memory) throw std::bad_alloc();
  return memory;
}

template <typename Call>
void RunOnCpu(const Problem& problem, const typename Call::Arrays& arrays, int threads) {
  const auto workspace = AllocateAligned(Call::kCpuWorkspaceBytes(problem));
  CallThreads call_threads(threads);
  ThrowUnlessOk(Call::kCpu(problem, arrays, workspace.get(), call_threads.Get()));
}

template <typename Call>
void RunOnCuda(const Problem& problem, const typename Call::Arrays& arrays, uintptr_t workspace, uintptr_t stream) {
  ThrowUnlessOk(Call::kCuda(problem, arrays, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream)));
}

template <typename Call>
size_t CudaWorkspaceBytes(const Problem& problem, bool any_gpu) {
  size_t bytes = 0;
  ThrowUnlessOk(Call::kCudaWorkspaceBytes(problem, &bytes, any_gpu ? cuda::Gpus::kAny : cuda::Gpus::kCurrent));
  return bytes;
}

// A gradient phase is GradientNormalize if there are `statistics`, else GradientMoments.
void CpuGradientPhase(const Problem& problem, const BackwardArrays& arrays, const StatisticsGradient* statistics,
                      int threads) {
  if (!statistics) return RunOnCpu<GradientMomentsCall>(problem, arrays, threads);
  RunOnCpu<GradientNormalizeCall>(problem, {arrays, *statistics}, threads);
}

void CudaGradientPhase(const Problem& problem, const BackwardArrays& arrays, const StatisticsGradient* statistics,
                       uintptr_t workspace, uintptr_t stream) {
  if (!statistics) return RunOnCuda<GradientMomentsCall>(problem, arrays, workspace, stream);
  RunOnCuda<GradientNormalizeCall>(problem, {arrays, *statistics}, workspace, stream);
}

Problem MakeProblem(const std::vector<int64_t>& shape, int64_t axis, DataType dtype, const std::string& activation,
                    bool has_residual, bool training, double epsilon, double exponential_avg_factor, bool unbiased,
                    int64_t virtual_batch_size, bool in_place) {
  Problem problem;
  ThrowUnlessOk(Fold(shape.data(), static_cast<int>(shape.size()), axis, &problem));
  ThrowUnlessOk(ParseActivation(activation, &problem));
  problem.dtype = dtype;
  problem.has_residual = has_residual;
  problem.training = training;
  problem.epsilon = epsilon;
  problem.exponential_avg_factor = exponential_avg_factor;
  problem.unbiased = unbiased;
  if (training) {
    ThrowUnlessOk(SetVirtualBatches(shape.data(), static_cast<int>(shape.size()), axis, virtual_batch_size, &problem));
  }
  problem.in_place = in_place;
  ThrowUnlessOk(Validate(problem));
  return problem;
}

py::dict Driver() {
  int version = 0, count = 0;
  const Status status = cuda::Driver(&version, &count);
  py::list gpus;
  std::string problem = status.message;
  bool any = false;
  for (int i = 0; i < count; ++i) {
    cuda::Gpu gpu;
    ThrowUnlessOk(cuda::Describe(i, &gpu));
    py::dict entry;
    entry["name"] = gpu.name;
    entry["compute_capability"] =
        std::to_string(gpu.compute_capability / 10) + "." + std::to_string(gpu.compute_capability % 10);
    entry["multiprocessors"] = gpu.multiprocessors;
    entry["memory_bytes"] = gpu.memory_bytes;
    const Status checked = cuda::CheckGpu(i);
    entry["problem"] = checked.message;
    gpus.append(entry);
    any = any || checked.ok();
    if (problem.empty()) problem = checked.message;
  }
  py::dict driver;
  driver["cuda_driver"] =
      version == 0 ? std::string() : std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  driver["gpus"] = gpus;
  driver["cuda_problem"] = any ? std::string() : problem;
  return driver;
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  m.doc() = "csrc/batch_norm/batch_norm.h";

  // Types are this module's own: a test process loads csrc/simt's build of it as well.
  const py::module_local local;
  py::enum_<DataType>(m, "DataType", local)
      .value("float16", DataType::kFloat16)
      .value("bfloat16", DataType::kBFloat16)
      .value("float32", DataType::kFloat32)
      .value("float64", DataType::kFloat64);

  py::class_<Problem>(m, "Problem", local)
      .def(py::init(&MakeProblem), py::kw_only(), py::arg("shape"), py::arg("axis"), py::arg("dtype"),
           py::arg("activation"), py::arg("has_residual"), py::arg("training"), py::arg("epsilon"),
           py::arg("exponential_avg_factor"), py::arg("unbiased"), py::arg("virtual_batch_size") = 0,
           py::arg("in_place") = false)
      .def_readonly("dtype", &Problem::dtype)
      .def_readonly("outer", &Problem::outer)
      .def_readonly("channels", &Problem::channels)
      .def_readonly("inner", &Problem::inner)
      .def_property_readonly("activation", [](const Problem& p) { return static_cast<int>(p.activation); })
      .def_readonly("negative_slope", &Problem::negative_slope)
      .def_readonly("max_value", &Problem::max_value)
      .def_readonly("threshold", &Problem::threshold)
      .def_readonly("alpha", &Problem::alpha)
      .def_readonly("has_residual", &Problem::has_residual)
      .def_readonly("training", &Problem::training)
      .def_readonly("epsilon", &Problem::epsilon)
      .def_readonly("exponential_avg_factor", &Problem::exponential_avg_factor)
      .def_readonly("unbiased", &Problem::unbiased)
      .def_readonly("virtual_batches", &Problem::virtual_batches)
      .def_readonly("in_place", &Problem::in_place)
      .def_property_readonly("elements", &Problem::Elements)
      .def_property_readonly(
          "activation_bits_bytes",
          [](const Problem& p) { return NeedsActivationBits(p) ? LayoutOfActivationBits(p).Bytes() : 0; })
      .def_property_readonly("needs_activation_bits", &NeedsActivationBits)
      .def_property_readonly("needs_residual", &NeedsResidual);

  py::class_<ForwardArrays> forward(m, "ForwardArrays", local);
  forward.def(py::init<>());
  DefinePointer(forward, "x", &ForwardArrays::x);
  DefinePointer(forward, "scale", &ForwardArrays::scale);
  DefinePointer(forward, "offset", &ForwardArrays::offset);
  DefinePointer(forward, "residual", &ForwardArrays::residual);
  DefinePointer(forward, "mean", &ForwardArrays::mean);
  DefinePointer(forward, "variance", &ForwardArrays::variance);
  DefinePointer(forward, "y", &ForwardArrays::y);
  DefinePointer(forward, "mean_out", &ForwardArrays::mean_out);
  DefinePointer(forward, "variance_out", &ForwardArrays::variance_out);
  DefinePointer(forward, "saved_mean", &ForwardArrays::saved_mean);
  DefinePointer(forward, "saved_inv_std", &ForwardArrays::saved_inv_std);
  DefinePointer(forward, "activation_bits", &ForwardArrays::activation_bits);

  py::list names;
  for (const Activation activation : kActivations) {
    if (!names.contains(NameOf(activation))) names.append(NameOf(activation));
  }
  m.attr("ACTIVATIONS") = py::tuple(names);

  py::class_<BackwardArrays> backward(m, "BackwardArrays", local);
  backward.def(py::init<>());
  DefinePointer(backward, "dy", &BackwardArrays::dy);
  DefinePointer(backward, "x", &BackwardArrays::x);
  DefinePointer(backward, "scale", &BackwardArrays::scale);
  DefinePointer(backward, "offset", &BackwardArrays::offset);
  DefinePointer(backward, "mean", &BackwardArrays::mean);
  DefinePointer(backward, "inv_std", &BackwardArrays::inv_std);
  DefinePointer(backward, "variance", &BackwardArrays::variance);
  DefinePointer(backward, "dmean", &BackwardArrays::dmean);
  DefinePointer(backward, "dvariance", &BackwardArrays::dvariance);
  DefinePointer(backward, "residual", &BackwardArrays::residual);
  DefinePointer(backward, "activation_bits", &BackwardArrays::activation_bits);
  DefinePointer(backward, "dx", &BackwardArrays::dx);
  DefinePointer(backward, "dscale", &BackwardArrays::dscale);
  DefinePointer(backward, "doffset", &BackwardArrays::doffset);
  DefinePointer(backward, "dmean_in", &BackwardArrays::dmean_in);
  DefinePointer(backward, "dvariance_in", &BackwardArrays::dvariance_in);
  DefinePointer(backward, "dresidual", &BackwardArrays::dresidual);

  py::class_<Mask> mask(m, "Mask", local);
  mask.def(py::init<>()).def_readwrite("length", &Mask::length);
  DefinePointer(mask, "flags", &Mask::flags);

  py::class_<MomentsArrays> moments(m, "MomentsArrays", local);
  moments.def(py::init<>()).def_readwrite("mask", &MomentsArrays::mask);
  DefinePointer(moments, "x", &MomentsArrays::x);
  DefinePointer(moments, "count", &MomentsArrays::count);
  DefinePointer(moments, "mean", &MomentsArrays::mean);
  DefinePointer(moments, "variance", &MomentsArrays::variance);

  py::class_<StatisticsGradient> statistics(m, "StatisticsGradient", local);
  statistics.def(py::init<>()).def_readwrite("mask", &StatisticsGradient::mask);
  DefinePointer(statistics, "tilt", &StatisticsGradient::tilt);
  DefinePointer(statistics, "shift", &StatisticsGradient::shift);

  py::class_<cuda::Device> device(m, "CudaDevice", local);
  device.def(py::init([] {
    cuda::Device current;
    // The defaults stand where there is no GPU.
    return cuda::CurrentDevice(&current).ok() ? current : cuda::Device();
  }));
  DefineDeviceProperty(device, "compute_capability", &cuda::Device::compute_capability);
  DefineDeviceProperty(device, "multiprocessors", &cuda::Device::multiprocessors);
  DefineDeviceProperty(device, "shared_bytes_per_block", &cuda::Device::shared_bytes_per_block);
  DefineDeviceProperty(device, "l2_bytes", &cuda::Device::l2_bytes);
  DefineDeviceProperty(device, "largest_cluster", &cuda::Device::largest_cluster);
  DefineDeviceProperty(device, "cooperative", &cuda::Device::cooperative);
  py::class_<cuda::Plan>(m, "CudaPlan", local)
      .def_readonly("tier", &cuda::Plan::tier)
      .def_readonly("reason", &cuda::Plan::reason)
      .def_readonly("launches", &cuda::Plan::launches)
      .def_readonly("lanes", &cuda::Plan::lanes)
      .def_readonly("threads", &cuda::Plan::threads)
      .def_readonly("blocks", &cuda::Plan::blocks)
      .def_readonly("blocks_per_slab", &cuda::Plan::blocks_per_slab)
      .def_readonly("shared_bytes", &cuda::Plan::shared_bytes)
      .def_readonly("read_again", &cuda::Plan::read_again)
      .def_readonly("waves", &cuda::Plan::waves)
      .def_readonly("nanoseconds", &cuda::Plan::nanoseconds)
      .def_readonly("index", &cuda::Plan::index);
  m.def("cuda_plan", [](const Problem& problem, bool backward, bool aligned, const cuda::Device& device) {
    cuda::Plan plan;
    ThrowUnlessOk(cuda::MakePlan(problem, backward, aligned, device, &plan));
    return plan;
  });

  m.def("cuda_plans", [](const Problem& problem, bool backward, bool aligned, const cuda::Device& device) {
    std::vector<cuda::Plan> plans;
    ThrowUnlessOk(cuda::ListPlans(problem, backward, aligned, device, &plans));
    return plans;
  });
  m.def("cuda_plan_time", [](const Problem& problem, bool backward, bool aligned, const cuda::Device& device, int index,
                             const std::map<std::string, double>& tuning) {
    double nanoseconds = 0;
    ThrowUnlessOk(cuda::PlanTime(problem, backward, aligned, device, index, tuning, &nanoseconds));
    return nanoseconds;
  });
  m.def("cuda_occupancy", &OccupancyForPython);
  m.def("cuda_launches", &LaunchesForPython);
  m.def("reset_cuda_launches", &cuda::ResetLaunches);
  m.def("policy_settings", &PolicySettingsForPython);
  m.def("set_policy_settings", &SetPolicySettings, py::kw_only(), py::arg("tier") = py::none(),
        py::arg("cluster") = py::none(), py::arg("free_multiprocessors") = py::none(),
        py::arg("tuning") = std::map<std::string, double>());

  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("cpu_forward", &RunOnCpu<ForwardCall>, release);
  m.def("cpu_backward", &RunOnCpu<BackwardCall>, release);
  m.def("cuda_forward", &RunOnCuda<ForwardCall>, release);
  m.def("cuda_backward", &RunOnCuda<BackwardCall>, release);
  m.def("cuda_forward_workspace_bytes", &CudaWorkspaceBytes<ForwardCall>, py::arg("problem"),
        py::arg("any_gpu") = false);
  m.def("cuda_backward_workspace_bytes", &CudaWorkspaceBytes<BackwardCall>, py::arg("problem"),
        py::arg("any_gpu") = false);
  m.def("cpu_forward_workspace_bytes", &cpu::ForwardWorkspaceBytes);
  m.def("cpu_backward_workspace_bytes", &cpu::BackwardWorkspaceBytes);
  m.def("cpu_moments", &RunOnCpu<MomentsCall>, release);
  m.def("cpu_gradient_phase", &CpuGradientPhase, release);
  m.def("cuda_moments", &RunOnCuda<MomentsCall>, release);
  m.def("cuda_gradient_phase", &CudaGradientPhase, release);
  m.def("cuda_moments_workspace_bytes", &CudaWorkspaceBytes<MomentsCall>, py::arg("problem"),
        py::arg("any_gpu") = false);

  m.def("instruction_set", &cpu::InstructionSet);
  m.def("cuda_build", [] {
    const cuda::BuildInfo info = cuda::Build();
    py::dict build;
    build["cuda"] = info.built;
    build["cuda_toolkit"] = info.toolkit;
    build["cuda_architectures"] = info.architectures;
    build["cuda_driver_needed"] = info.driver_needed;
    return build;
  });
  m.def("driver", &Driver);
  m.def("gpu_problem", [](int index) { return cuda::CheckGpu(index).message; }, release);
#ifdef TFOPS_SIMT
  simt::DefineControls(m);
#endif
}

}  // namespace tfops
