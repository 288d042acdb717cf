// The entry points of namespace cuda in a build without CUDA.

#include "csrc/batch_norm/batch_norm.h"

namespace tfops::cuda {
namespace {

Status NotBuilt() {
  return {StatusCode::kUnavailable, "this build of tfops has no CUDA kernels; install one that has, or run on the CPU"};
}

}  // namespace

Status ForwardWorkspaceBytes(const Problem&, size_t*, Gpus) { return NotBuilt(); }
Status BackwardWorkspaceBytes(const Problem&, size_t*, Gpus) { return NotBuilt(); }
Status Forward(const Problem&, const ForwardArrays&, void*, void*) { return NotBuilt(); }
Status Backward(const Problem&, const BackwardArrays&, void*, void*) { return NotBuilt(); }
Status MomentsWorkspaceBytes(const Problem&, size_t*, Gpus) { return NotBuilt(); }
Status BatchMoments(const Problem&, const MomentsArrays&, void*, void*) { return NotBuilt(); }
Status GradientMoments(const Problem&, const BackwardArrays&, void*, void*) { return NotBuilt(); }
Status GradientNormalize(const Problem&, const BackwardArrays&, const StatisticsGradient&, void*, void*) {
  return NotBuilt();
}
Rehearsal::Rehearsal() {}
Rehearsal::~Rehearsal() {}
Status CurrentDevice(Device*) { return NotBuilt(); }
Status MakePlan(const Problem&, bool, bool, const Device&, Plan*) { return NotBuilt(); }
Status DescribeOccupancy(const Device&, DataType, bool, Occupancy*) { return NotBuilt(); }
Status ListPlans(const Problem&, bool, bool, const Device&, std::vector<Plan>*) { return NotBuilt(); }
Status PlanTime(const Problem&, bool, bool, const Device&, int, const std::map<std::string, double>&, double*) {
  return NotBuilt();
}
PolicySettings GetPolicySettings() { return {}; }
Status SetPolicySettings(const PolicySettings&) { return NotBuilt(); }
Launches GetLaunches() { return {}; }
void ResetLaunches() {}
BuildInfo Build() { return {}; }
Status Driver(int*, int*) { return NotBuilt(); }
Status Describe(int, Gpu*) { return NotBuilt(); }
Status CheckDriver(int*) { return NotBuilt(); }
Status CheckGpu(int) { return NotBuilt(); }

}  // namespace tfops::cuda
