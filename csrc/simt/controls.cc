// Seed, device, counting and reports, and the planted faults, for Python. The CPU kernels are not of this module.

#include "csrc/simt/controls.h"

#include <cuda_runtime.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/simt/machine.h"
#include "csrc/simt/plants.h"
#include "csrc/simt/report.h"

namespace py = pybind11;

namespace simt {
namespace {

py::list TakeReportsForPython() {
  py::list reports;
  for (const LaunchReport& report : TakeReports()) {
    const auto extent = [](const dim3& e) { return py::make_tuple(e.x, e.y, e.z); };
    py::dict traffic;
    for (const auto& [name, count] : report.traffic) {
      py::dict entry;
      entry["loaded"] = count.loaded;
      entry["load_moved"] = count.loaded_sectors * 32;
      entry["stored"] = count.stored;
      entry["store_moved"] = count.stored_sectors * 32;
      traffic[py::str(name)] = entry;
    }
    py::dict launch;
    launch["kernel"] = report.kernel;
    launch["grid"] = extent(report.grid.grid);
    launch["block"] = extent(report.grid.block);
    launch["cluster"] = report.grid.cluster;
    launch["dynamic_shared"] = report.grid.dynamic_shared;
    launch["static_shared"] = report.static_shared;
    launch["cooperative"] = report.grid.cooperative;
    launch["traffic"] = traffic;
    reports.append(launch);
  }
  return reports;
}

py::dict DevicesForPython() {
  py::dict devices;
  for (const Device& device : Devices()) {
    py::dict entry;
    entry["compute_capability"] = device.capability;
    entry["multiprocessors"] = device.multiprocessors;
    entry["shared_bytes"] = device.shared_kb << 10;
    entry["l2_bytes"] = device.l2_kb << 10;
    entry["largest_cluster"] = device.largest_cluster;
    devices[device.name] = entry;
  }
  return devices;
}

void SetDevice(const std::string& name) {
  for (size_t i = 0; i < Devices().size(); ++i) {
    if (Devices()[i].name == name && cudaSetDevice(static_cast<int>(i)) == cudaSuccess) return;
  }
  throw py::value_error("no device " + name);
}

void RunPlantForPython(const std::string& name, bool planted, uintptr_t input, uintptr_t output) {
  const tfops::Status status =
      tfops::cuda::RunPlant(name, planted, reinterpret_cast<const float*>(input), reinterpret_cast<float*>(output));
  if (!status.ok()) throw std::runtime_error(status.message);
}

// What a call takes of the host, in nanoseconds: the median of `calls`, with its workspace asked for.
template <auto WorkspaceBytes, auto Call, typename Arrays>
double HostNanoseconds(const tfops::Problem& problem, const Arrays& arrays, uintptr_t workspace, int calls) {
  std::vector<double> times;
  for (int i = 0; i < calls; ++i) {
    const auto start = std::chrono::steady_clock::now();
    size_t bytes = 0;
    tfops::Status status = WorkspaceBytes(problem, &bytes, tfops::cuda::Gpus::kCurrent);
    if (status.ok()) status = Call(problem, arrays, reinterpret_cast<void*>(workspace), nullptr);
    if (!status.ok()) throw std::runtime_error(status.message);
    times.push_back(std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + calls / 2, times.end());
  return times[calls / 2];
}

}  // namespace

void DefineControls(py::module_& module) {
  module.def("set_seed", &SetSeed);
  module.def("devices", &DevicesForPython);
  module.def("set_device", &SetDevice);
  module.def("set_counting", [](bool on) { counting = on; });
  module.def("loads", [] { return loads; });
  module.def("watch", &Watch);
  module.def("clear_watches", &ClearWatches);
  module.def("take_reports", &TakeReportsForPython);
  module.def("refuse_launches",
             [](const std::string& kind, int error) { RefuseLaunches(kind, static_cast<cudaError_t>(error)); });
  module.def("set_capturing", &SetCapturing, py::arg("capturing"), py::arg("ends") = false);
  module.def("set_stubbed", &SetStubbed);
  module.def("host_nanoseconds",
             &HostNanoseconds<tfops::cuda::ForwardWorkspaceBytes, tfops::cuda::Forward, tfops::ForwardArrays>);
  module.def("host_nanoseconds",
             &HostNanoseconds<tfops::cuda::BackwardWorkspaceBytes, tfops::cuda::Backward, tfops::BackwardArrays>);
  module.def("run_plant", &RunPlantForPython);
}

}  // namespace simt

namespace tfops::cpu {

static Status CudaOnly() { return {StatusCode::kUnavailable, "this module runs CUDA kernels only"}; }

size_t ForwardWorkspaceBytes(const Problem&) { return 0; }
size_t BackwardWorkspaceBytes(const Problem&) { return 0; }
size_t MomentsWorkspaceBytes(const Problem&) { return 0; }
Status Forward(const Problem&, const ForwardArrays&, void*, const Threads&) { return CudaOnly(); }
Status Backward(const Problem&, const BackwardArrays&, void*, const Threads&) { return CudaOnly(); }
Status BatchMoments(const Problem&, const MomentsArrays&, void*, const Threads&) { return CudaOnly(); }
Status GradientMoments(const Problem&, const BackwardArrays&, void*, const Threads&) { return CudaOnly(); }
Status GradientNormalize(const Problem&, const BackwardArrays&, const StatisticsGradient&, void*, const Threads&) {
  return CudaOnly();
}
const char* InstructionSet() { return "none"; }

}  // namespace tfops::cpu
