// Devices on paper, and the checks of a launch.

#include "csrc/simt/runtime.h"

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <map>
#include <mutex>
#include <string>

#include "csrc/simt/machine.h"
#include "csrc/simt/report.h"

namespace simt {
namespace {

constexpr int kUsualShared = 48 << 10;  // that a kernel has without asking for more
constexpr int kRegisters = 64 << 10;    // of a multiprocessor
constexpr int kMostThreads = 1024;
constexpr unsigned kPortableCluster = 8;

// Real devices, and small ones on which small tensors meet the limits that large tensors meet on the real ones.
const std::vector<Device> devices = {
    {"h200", 90, 132, 227, 228, 50 << 10, 16, {66, 31, 15, 7}},
    {"three", 90, 3, 227, 228, 50 << 10, 16, {-1, -1, -1, -1}},
    {"one", 75, 1, 64, 64, 4 << 10, 1, {}},
    {"small", 90, 4, 48, 50, 256, 8, {-1, -1, -1, -1}},
    {"small_old", 80, 4, 48, 50, 256, 1, {}},
    {"a100", 80, 108, 163, 164, 40 << 10, 1, {}},
    {"b200", 100, 148, 227, 228, 126 << 10, 16, {-1, -1, -1, -1}},
    {"rtx", 120, 36, 99, 100, 32 << 10, 8, {-1, -1, -1, 0}},
    {"v100", 70, 80, 96, 96, 6 << 10, 1, {}},
    {"slice", 90, 16, 227, 228, 8 << 10, 16, {8, 3, 0, 0}},
};

struct Allowed {
  int dynamic_shared = kUsualShared;
  bool large_clusters = false;
};

int current_device = 0;
std::string refused_kind;
cudaError_t refused_error = cudaSuccess;
cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
bool refusals_end_captures = false;
bool stubbed = false;
std::string last_error;
std::map<std::pair<const void*, int>, Allowed> allowed;  // by kernel and device
std::mutex mutex;                                        // the machine is one

const Device& Current() { return devices[current_device]; }

// The bytes of each block's shared memory that the system reserves.
int Reserved(const Device& device) { return device.capability >= 80 ? 1 << 10 : 0; }

cudaError_t Error(cudaError_t code, const std::string& message) {
  last_error = message;
  return code;
}

// The blocks of a kernel that a multiprocessor holds at once. How many registers nvcc would give a thread is not known
// here: the most that any kernel of the project has, 256 with what is rounded up.
int BlocksAtOnce(const void* kernel, int threads, size_t dynamic) {
  const int rounded = (threads + 31) / 32 * 32;
  const int registers = std::min(256, kRegisters / rounded);
  const size_t shared = dynamic + StaticSharedBytes(kernel) + Reserved(Current());
  if (shared > (static_cast<size_t>(Current().shared_kb) << 10) + Reserved(Current())) return 0;
  const int by_shared =
      static_cast<int>((static_cast<size_t>(Current().multiprocessor_kb) << 10) / std::max(shared, size_t{1}));
  const int most_threads = Current().capability == 75 ? 1024 : Current().capability == 120 ? 1536 : 2048;
  return std::min({by_shared, most_threads / rounded, kRegisters / (registers * rounded), 32});
}

// The static shared memory of a kernel as CUDA tells it: from 9.0 on, with what the system reserves.
int ToldStaticShared(const void* kernel) {
  return static_cast<int>(StaticSharedBytes(kernel)) + (Current().capability >= 90 ? Reserved(Current()) : 0);
}

// The clusters that run at once, of so many blocks.
int ClustersAtOnce(unsigned size, int blocks_at_once) {
  constexpr unsigned kSizes[] = {2, 4, 8, 16};
  const auto* const found = std::find(std::begin(kSizes), std::end(kSizes), size);
  if (found == std::end(kSizes) || size > Current().largest_cluster) return 0;
  const int listed = Current().clusters[found - std::begin(kSizes)];
  return listed >= 0 ? blocks_at_once * listed : blocks_at_once * Current().multiprocessors / static_cast<int>(size);
}

// "" unless CUDA would refuse the launch.
std::string Refuse(const Grid& grid) {
  const dim3 g = grid.grid, b = grid.block;
  const size_t threads = static_cast<size_t>(b.x) * b.y * b.z;
  const size_t blocks = static_cast<size_t>(g.x) * g.y * g.z;
  const Allowed& may = allowed[{grid.kernel, current_device}];
  if (blocks == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) return "the grid's extent";
  if (threads == 0 || threads > kMostThreads || b.z > 64) return "the block's extent";
  if (grid.cluster > std::max(Current().largest_cluster, 1u)) return "a cluster larger than this GPU has";
  if (grid.cluster > kPortableCluster && !may.large_clusters) return "a cluster of more than 8 blocks, not asked for";
  if (grid.cluster == 0 || g.x % grid.cluster != 0) return "a grid that is not a multiple of its clusters";
  if (grid.dynamic_shared > static_cast<size_t>(may.dynamic_shared)) return "more shared memory than was asked for";
  const int at_once = BlocksAtOnce(grid.kernel, static_cast<int>(threads), grid.dynamic_shared);
  if (grid.cluster > 1 && ClustersAtOnce(grid.cluster, at_once) == 0) return "a cluster that finds no room";
  if (grid.cooperative) {
    if (blocks > static_cast<size_t>(at_once) * Current().multiprocessors) {
      return "a cooperative grid of " + std::to_string(blocks) + " blocks, of which each of " +
             std::to_string(Current().multiprocessors) + " multiprocessors can hold " + std::to_string(at_once);
    }
  }
  return "";
}

}  // namespace

const std::vector<Device>& Devices() { return devices; }

void RefuseLaunches(const std::string& kind, cudaError_t error) {
  refused_kind = kind;
  refused_error = error;
}

void SetCapturing(bool capturing, bool ends) {
  capture = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  refusals_end_captures = ends;
}

void SetStubbed(bool on) { stubbed = on; }

cudaError_t Launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(mutex);
  Grid grid;
  grid.kernel = kernel;
  grid.grid = config.gridDim;
  grid.block = config.blockDim;
  grid.dynamic_shared = config.dynamicSmemBytes;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) grid.cooperative = attribute.val.cooperative != 0;
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& cluster = attribute.val.clusterDim;
      if (cluster.y != 1 || cluster.z != 1) return Error(cudaErrorInvalidValue, "simt has clusters along x only");
      grid.cluster = cluster.x;
    }
  }
  if ((refused_kind == "cooperative" && grid.cooperative) || (refused_kind == "cluster" && grid.cluster > 1) ||
      (refused_kind == "dynamic" && grid.dynamic_shared > 0)) {
    if (capture != cudaStreamCaptureStatusNone && refusals_end_captures) capture = cudaStreamCaptureStatusInvalidated;
    return Error(refused_error, "refused, as told");
  }
  if (stubbed) return cudaSuccess;
  const std::string name = KernelName(kernel);
  if (const std::string refused = Refuse(grid); !refused.empty()) {
    return Error(cudaErrorInvalidConfiguration, "in " + name + ", " + refused);
  }
  const std::string failure = Run(grid, thread);
  if (!failure.empty()) return Error(cudaErrorLaunchFailure, "in " + name + ", " + failure);
  const size_t shared = StaticSharedBytes(kernel);
  if (shared > kUsualShared || shared + grid.dynamic_shared > static_cast<size_t>(Current().shared_kb) << 10) {
    return Error(cudaErrorLaunchFailure, "in " + name + ", " + std::to_string(shared) + " bytes of static and " +
                                             std::to_string(grid.dynamic_shared) + " of dynamic shared memory");
  }
  AddReport(grid);
  return cudaSuccess;
}

}  // namespace simt

using simt::Current;
using simt::Error;

const char* cudaGetErrorString(cudaError_t) { return simt::last_error.c_str(); }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(simt::devices.size());
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = simt::current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= static_cast<int>(simt::devices.size())) {
    return Error(cudaErrorInvalidDevice, "no device " + std::to_string(device));
  }
  simt::current_device = device;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = simt::capture;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  const simt::Device& device = simt::devices.at(index);
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "%s", device.name);
  properties->major = device.capability / 10;
  properties->minor = device.capability % 10;
  properties->multiProcessorCount = device.multiprocessors;
  properties->l2CacheSize = device.l2_kb << 10;
  properties->cooperativeLaunch = 1;
  properties->clusterLaunch = device.largest_cluster > 1;
  properties->totalGlobalMem = size_t{16} << 30;
  properties->sharedMemPerBlock = simt::kUsualShared;
  properties->sharedMemPerBlockOptin = static_cast<size_t>(device.shared_kb) << 10;
  properties->sharedMemPerMultiprocessor = static_cast<size_t>(device.multiprocessor_kb) << 10;
  properties->reservedSharedMemPerBlock = simt::Reserved(device);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  const simt::Device& device = simt::devices.at(index);
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = simt::kUsualShared;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      break;
    case cudaDevAttrL2CacheSize:
      *value = device.l2_kb << 10;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.multiprocessor_kb << 10;
      break;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = simt::kRegisters;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_kb << 10;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = simt::Reserved(device);
      break;
    case cudaDevAttrClusterLaunch:
      *value = device.largest_cluster > 1;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  ++simt::loads;
  *attributes = {static_cast<size_t>(simt::ToldStaticShared(kernel)),
                 simt::allowed[{kernel, simt::current_device}].dynamic_shared, simt::kMostThreads, 255,
                 Current().capability};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  simt::Allowed& may = simt::allowed[{kernel, simt::current_device}];
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) may.large_clusters = value != 0;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    // What a block may have is by the strictest reading of CUDA's numbers.
    const int reserved = Current().capability >= 90 ? simt::Reserved(Current()) : 0;
    if (value < 0 || value + simt::ToldStaticShared(kernel) + reserved > Current().shared_kb << 10) {
      return Error(cudaErrorInvalidValue, "more shared memory than this GPU has");
    }
    may.dynamic_shared = value;
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          size_t dynamic) {
  *blocks = simt::BlocksAtOnce(kernel, threads, dynamic);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  }
  const dim3& block = config->blockDim;
  const int at_once =
      simt::BlocksAtOnce(kernel, static_cast<int>(block.x * block.y * block.z), config->dynamicSmemBytes);
  *clusters = simt::ClustersAtOnce(cluster, at_once);
  return cudaSuccess;
}
