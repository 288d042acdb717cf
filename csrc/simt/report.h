// What is said about a launch: who waits where when it went wrong, and the traffic with global memory.

#ifndef TFOPS_SIMT_REPORT_H_
#define TFOPS_SIMT_REPORT_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "csrc/simt/block.h"
#include "csrc/simt/machine.h"

namespace simt {

SharedVariable NewShared(size_t bytes, size_t alignment);

// Blocks and threads, with those that are in the same place taken together.
std::string DescribeThreads(const std::vector<Block>& blocks);
std::string DescribeThread(const Thread& thread);

// Global memory moves in sectors of 32 bytes. A warp's access moves each sector that one of its lanes touches, once.
struct Traffic {
  int64_t loaded = 0;          // bytes that threads asked for
  int64_t loaded_sectors = 0;  // moved for that
  int64_t stored = 0;
  int64_t stored_sectors = 0;
};

struct LaunchReport {
  std::string kernel;
  Grid grid;
  size_t static_shared = 0;
  std::map<std::string, Traffic> traffic;  // by the name of the array; "" is of what is not watched
};

// Gives an array a name in the reports. Watches last until ClearWatches().
void Watch(const std::string& name, uintptr_t address, size_t bytes);
void ClearWatches();

// The reports of the launches since the last call.
std::vector<LaunchReport> TakeReports();
void AddReport(const Grid& grid);

}  // namespace simt

#endif  // TFOPS_SIMT_REPORT_H_
