// What CUDA says of the on-chip kernels before they are launched, and what is done when it refuses one all the same.

#include <array>
#include <map>
#include <mutex>
#include <string>

#include "csrc/batch_norm/cuda/launch.h"
#include "csrc/batch_norm/cuda/onchip_launch.h"
#include "csrc/batch_norm/cuda/prepare.h"

namespace tfops::cuda {
namespace {

// Errors that say that a GPU does not start such a launch: it is shared or partitioned, perhaps. All others are of
// something else, and no other kernel would start either.
bool IsRefusal(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorCooperativeLaunchTooLarge:
    case cudaErrorNotPermitted:
    case cudaErrorNotSupported:
    case cudaErrorInvalidClusterSize:
      return true;
    default:
      return false;
  }
}

// How many clusters of a kernel run at once; none where there are none of that size.
int ActiveClusters(const void* kernel, const LaunchShape& shape) {
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = ConfigOf(shape, nullptr, attributes);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess) return clusters;
  cudaGetLastError();  // that is an answer
  return 0;
}

Status Ask(const Device& device, const void* kernel, Occupancy* occupancy) {
  *occupancy = {};
  occupancy->asked = true;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) {
    occupancy->static_bytes = static_cast<int>(attributes.sharedSizeBytes);
    occupancy->room = RoomOf(device, occupancy->static_bytes);
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(occupancy->room));
  }
  // Code that was made for GPUs before 9.0 has none, whatever GPU runs it.
  const bool has_clusters = error == cudaSuccess && attributes.ptxVersion >= 90;
  if (error == cudaSuccess && device.largest_cluster > 8) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  const int threads = OnChipTuning::kThreads, room = static_cast<int>(occupancy->room);
  int of_multiprocessor = 0;
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_multiprocessor, kernel, threads, room);
  }
  if (error != cudaSuccess) return ToStatus(error, "asking how many blocks of a CUDA kernel run at once");
  occupancy->blocks = device.multiprocessors * of_multiprocessor;
  for (size_t s = 0; s < std::size(Occupancy::kClusters); ++s) {
    const int size = Occupancy::kClusters[s];
    if (size > device.largest_cluster || occupancy->blocks == 0 || !has_clusters) continue;
    occupancy->clusters[s] = ActiveClusters(kernel, LaunchShape{{size}, {threads}, size, room});
  }
  return {};
}

}  // namespace

Status AskOccupancy(const Device& device, DataType dtype, Pass pass, Occupancy* occupancy) {
  static std::mutex mutex;
  static auto* const answers = new std::map<std::array<int, 3>, Occupancy>;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::array<int, 3> key = {device.number, static_cast<int>(dtype), static_cast<int>(pass)};
  if (const auto found = answers->find(key); found != answers->end()) {
    *occupancy = found->second;
    return {};
  }
  // CUDA is asked for the thread's current device.
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device.number) error = cudaSetDevice(device.number);
  if (error != cudaSuccess) return ToStatus(error, "asking for the current GPU");
  const void* const kernel = pass == Pass::kForward ? OnChipForwardKernelOf(dtype) : OnChipBackwardKernelOf(dtype);
  const Status status = Ask(device, kernel, occupancy);
  if (current != device.number) cudaSetDevice(current);
  if (status.ok()) answers->emplace(key, *occupancy);
  return status;
}

std::optional<Status> Settle(cudaError_t launched, const Problem& problem, Pass pass, bool aligned,
                             const Device& device, const Choice& choice, void* stream) {
  if (launched == cudaSuccess) {
    CountCall(choice.tier);
    return Status();
  }
  const Status status = ToStatus(launched, "starting a CUDA kernel");
  if (!IsRefusal(launched)) return status;
  const std::string error = cudaGetErrorString(launched);
  RememberRefusal(problem, pass, aligned, device, error);
  if (choice.forced) return status;
  // A graph that is being captured takes other kernels in place of the refused one, if it is still to be had.
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const cudaError_t asked = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture);
  if (asked == cudaSuccess && capture != cudaStreamCaptureStatusInvalidated) return std::nullopt;
  cudaGetLastError();
  return Status{StatusCode::kInternal, "CUDA refused a launch while its stream was captured, which ends the capture (" +
                                           error + "); capture again, and the streaming tier will do this work"};
}

}  // namespace tfops::cuda
