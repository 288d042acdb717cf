// Reports in words, and the count of memory traffic.

#include "csrc/simt/report.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace simt {
namespace {

constexpr uintptr_t kSector = 32;
constexpr size_t kMostReports = 1 << 16;

struct Watched {
  std::string name;
  uintptr_t address;
  size_t bytes;
  Traffic traffic;
};

// The first one is for whatever the others do not hold.
std::vector<Watched> watched = {{"", 0, 0, {}}};
std::vector<LaunchReport> reports;

Traffic& TrafficOf(uintptr_t address) {
  for (size_t i = 1; i < watched.size(); ++i) {
    if (address - watched[i].address < watched[i].bytes) return watched[i].traffic;
  }
  return watched[0].traffic;
}

std::string Text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string Place(const Thread& thread) {
  if (thread.state == State::kReturned) return "returned";
  if (thread.state == State::kReady) return "ready";
  return "at " + std::string(thread.operation) + ", " + thread.position.file + ":" +
         std::to_string(thread.position.line);
}

// "0-15, 17, 32-62 in steps of 2", of sorted numbers.
std::string Ranges(const std::vector<unsigned>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    const unsigned step = i + 1 < numbers.size() ? numbers[i + 1] - numbers[i] : 1;
    size_t end = i;
    while (end + 1 < numbers.size() && numbers[end + 1] == numbers[end] + step) ++end;
    if (step > 1 && end == i + 1) end = i;  // no series
    if (!text.empty()) text += ", ";
    text += std::to_string(numbers[i]);
    if (end > i) text += "-" + std::to_string(numbers[end]);
    if (end > i && step > 1) text += " in steps of " + std::to_string(step);
    i = end + 1;
  }
  return text;
}

}  // namespace

bool counting = false;
int64_t loads = 0;

SharedVariable NewShared(size_t bytes, size_t alignment) {
  if (alignment > alignof(std::max_align_t)) Fail("shared memory aligned to " + std::to_string(alignment) + " bytes");
  SharedVariable variable{std::unique_ptr<char[]>(new char[bytes]), bytes};
  std::memset(variable.memory.get(), 0xff, bytes);  // NaN in every type
  return variable;
}

std::string DescribeThreads(const std::vector<Block>& blocks) {
  // Blocks in the same state are one line's: in a large grid there are many.
  std::map<std::string, std::vector<std::string>> blocks_of;
  for (const Block& block : blocks) {
    std::map<std::string, std::vector<unsigned>> threads_of;
    for (const Thread* thread : block.threads) threads_of[Place(*thread)].push_back(thread->linear);
    std::string text;
    for (const auto& [place, threads] : threads_of) text += "\n    threads " + Ranges(threads) + ": " + place;
    blocks_of[text].push_back(Text(block.index));
  }
  std::string text;
  for (const auto& [threads, names] : blocks_of) {
    constexpr size_t kMostNames = 8;
    text += text.empty() ? "  block" : "\n  block";
    for (size_t i = 0; i < std::min(names.size(), kMostNames); ++i) text += " " + names[i];
    if (names.size() > kMostNames) text += " and " + std::to_string(names.size() - kMostNames) + " more";
    text += threads;
  }
  return text;
}

std::string DescribeThread(const Thread& thread) {
  return "block " + Text(thread.block->index) + ", thread " + Text(thread.index) + ", number " +
         std::to_string(thread.linear);
}

std::string KernelName(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "a kernel";
  int status = 0;
  char* const demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = demangled ? demangled : info.dli_sname;
  std::free(demangled);
  // "void tfops::cuda::Kernel<float, 4>(Parameters...)"
  const size_t parameters = name.find('(');
  name = name.substr(0, parameters);
  const size_t arguments = std::min(name.find('<'), name.size());
  const size_t scope = name.rfind("::", arguments);
  return scope == std::string::npos ? name : name.substr(scope + 2);
}

bool WarpAccesses::Add(const void* site, unsigned lane, uint64_t sector, bool first_of_lane) {
  if (last_ >= sites_.size() || sites_[last_].address != site) {
    last_ = 0;
    while (last_ < sites_.size() && sites_[last_].address != site) ++last_;
    if (last_ == sites_.size()) sites_.push_back({site, {}, {}});
  }
  Site& here = sites_[last_];
  if (first_of_lane) ++here.times[lane];
  const uint32_t time = here.times[lane] - 1;
  if (here.sectors.size() <= time) here.sectors.resize(time + 1);
  std::vector<uint64_t>& sectors = here.sectors[time];
  if (std::find(sectors.begin(), sectors.end(), sector) != sectors.end()) return false;
  sectors.push_back(sector);
  return true;
}

// This is not inlined, so that the caller is the kernel, and its address the place of the access in the code.
__attribute__((noinline)) void Count(const void* address, size_t bytes, Access access) {
  const void* const site = __builtin_return_address(0);
  const auto first = reinterpret_cast<uintptr_t>(address);
  WarpAccesses& accesses = current->block->warps[current->linear / kWarp].accesses;
  int64_t sectors = 0;
  for (uintptr_t sector = first / kSector; sector <= (first + bytes - 1) / kSector; ++sector) {
    sectors += accesses.Add(site, current->linear % kWarp, sector, sector == first / kSector) ? 1 : 0;
  }
  Traffic& traffic = TrafficOf(first);
  if (access == Access::kLoad) {
    traffic.loaded += static_cast<int64_t>(bytes);
    traffic.loaded_sectors += sectors;
  } else {
    traffic.stored += static_cast<int64_t>(bytes);
    traffic.stored_sectors += sectors;
  }
}

void OnMisaligned(const void* address, size_t bytes) {
  Fail("a misaligned access of " + std::to_string(bytes) + " bytes, " +
       std::to_string(reinterpret_cast<uintptr_t>(address) % bytes) + " beyond a multiple of that");
}

void Watch(const std::string& name, uintptr_t address, size_t bytes) { watched.push_back({name, address, bytes, {}}); }

void ClearWatches() { watched.resize(1); }

void AddReport(const Grid& grid) {
  LaunchReport report{KernelName(grid.kernel), grid, StaticSharedBytes(grid.kernel), {}};
  for (Watched& array : watched) {
    report.traffic[array.name] = array.traffic;
    array.traffic = {};
  }
  if (reports.size() == kMostReports) reports.clear();  // nobody asks
  reports.push_back(std::move(report));
}

std::vector<LaunchReport> TakeReports() { return std::exchange(reports, {}); }

}  // namespace simt
