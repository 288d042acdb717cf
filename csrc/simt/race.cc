// The record of accesses, and what the compiler calls.

#include "csrc/simt/race.h"

#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <string>
#include <unordered_map>

#include "csrc/simt/block.h"
#include "csrc/simt/report.h"

namespace simt {

bool race_detection = false;
bool in_fiber = false;

namespace {

struct Record {
  const void* code = nullptr;  // where; null for none
  uint64_t block = 0;          // its number in the grid
  uint64_t cluster = 0;
  uint32_t thread = 0;
  uint32_t lanes_clock = 0;
  uint32_t block_barriers = 0;
  uint32_t cluster_barriers = 0;
  uint32_t grid_barriers = 0;
};

// The accesses to a byte. Two readers of different threads are enough: if any reader is not ordered before a write,
// then so is the last one or, where that is the writer itself, the last but one of another thread.
struct Accesses {
  Record write;
  std::array<Record, 2> reads;
};

std::unordered_map<uintptr_t, Accesses> accesses;

bool SameThread(const Record& a, const Record& b) { return a.block == b.block && a.thread == b.thread; }

bool IsOrdered(const Record& earlier, const Record& later) {
  if (!earlier.code || SameThread(earlier, later)) return true;
  if (later.grid_barriers > earlier.grid_barriers) return true;
  if (later.cluster == earlier.cluster && later.cluster_barriers > earlier.cluster_barriers) return true;
  if (later.block != earlier.block) return false;
  if (later.block_barriers > earlier.block_barriers) return true;
  if (later.thread / kWarp != earlier.thread / kWarp) return false;
  const LaneClocks& lanes = current->block->warps[later.thread / kWarp].lanes;
  return lanes.met[later.thread % kWarp][earlier.thread % kWarp] > earlier.lanes_clock;
}

Record Now(const void* code) {
  const Block& block = *current->block;
  Record now;
  now.code = code;
  now.block = (uint64_t{block.index.z} * gridDim.y + block.index.y) * gridDim.x + block.index.x;
  now.cluster = now.block - block.rank;
  now.thread = current->linear;
  now.lanes_clock = block.warps[current->linear / kWarp].lanes.now;
  now.block_barriers = block.block_barriers;
  now.cluster_barriers = block.cluster_barriers;
  now.grid_barriers = block.grid_barriers;
  return now;
}

// "file:line" of an address in the code, by the tool that comes with the compiler.
std::string SourceOf(const void* code) {
  Dl_info info;
  if (!dladdr(code, &info)) return "?";
  char command[1024];
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase) - 1;
  std::snprintf(command, sizeof(command), "LD_PRELOAD= addr2line -ie '%s' %#tx", info.dli_fname, offset);
  std::string text;
  if (FILE* const pipe = popen(command, "r")) {
    char line[512];
    while (std::fgets(line, sizeof(line), pipe)) text += (text.empty() ? "" : "\n      from ") + std::string(line);
    for (size_t end; (end = text.find("\n\n")) != std::string::npos;) text.erase(end, 1);
    pclose(pipe);
  }
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text.empty() ? "?" : text;
}

// An address that stands in the place of the code for the end of a block.
const char kEnd = 0;

std::string Describe(const Record& earlier, bool earlier_writes, const Record& later, bool later_writes) {
  const auto describe = [](const Record& record, bool writes) {
    const std::string who = "\n    block " + std::to_string(record.block) + ", thread " + std::to_string(record.thread);
    if (record.code == &kEnd) return who + " is the last to return, and the block's shared memory ends";
    return who + (writes ? " writes" : " reads") + " at " + SourceOf(record.code);
  };
  return "a race: no barrier orders two accesses to the same byte" + describe(earlier, earlier_writes) +
         describe(later, later_writes);
}

// What kernels read of the machine itself.
bool IsOwn(const void* address) {
  const void* const own[] = {&threadIdx, &blockIdx, &blockDim, &gridDim, &counting};
  for (const void* variable : own) {
    if (static_cast<size_t>(static_cast<const char*>(address) - static_cast<const char*>(variable)) < sizeof(dim3)) {
      return true;
    }
  }
  return false;
}

void OnAccess(const void* address, size_t bytes, bool writes, const void* code) {
  if (!in_fiber || current->fiber.Holds(address) || IsOwn(address)) return;
  const Record now = Now(code);
  const auto first = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t byte = first; byte < first + bytes; ++byte) {
    Accesses& before = accesses[byte];
    if (!IsOrdered(before.write, now)) Fail(Describe(before.write, true, now, writes));
    if (!writes) {
      if (!SameThread(before.reads[0], now)) before.reads[1] = before.reads[0];
      before.reads[0] = now;
      continue;
    }
    for (const Record& read : before.reads) {
      if (!IsOrdered(read, now)) Fail(Describe(read, false, now, true));
    }
    before.write = now;
  }
}

}  // namespace

void LaneClocks::Meet(unsigned mask) {
  ++now;
  for (unsigned a = 0; a < kWarp; ++a) {
    if (!(mask >> a & 1)) continue;
    for (unsigned b = 0; b < kWarp; ++b) {
      if (mask >> b & 1) met[a][b] = now;
    }
  }
}

void ForgetAccesses() { accesses.clear(); }

std::string EndOfMemory(const void* memory, size_t bytes) {
  if (!race_detection) return "";
  const Record now = Now(&kEnd);
  const auto first = reinterpret_cast<uintptr_t>(memory);
  for (uintptr_t byte = first; byte < first + bytes; ++byte) {
    Accesses& before = accesses[byte];
    for (const Record& read : before.reads) {
      if (read.block != now.block && !IsOrdered(read, now)) return Describe(read, false, now, true);
    }
    before.write = now;
  }
  return "";
}

void ForgetAccesses(const void* memory, size_t bytes) {
  if (accesses.empty()) return;
  const auto first = reinterpret_cast<uintptr_t>(memory);
  for (uintptr_t byte = first; byte < first + bytes; ++byte) accesses.erase(byte);
}

}  // namespace simt

// --- What the compiler calls -------------------------------------------------------------------------------------

#define TFOPS_SIMT_HOOK extern "C" __attribute__((visibility("hidden"))) void
#define TFOPS_SIMT_ACCESS(bytes)                                        \
  TFOPS_SIMT_HOOK __tsan_read##bytes(void* address) {                   \
    simt::OnAccess(address, bytes, false, __builtin_return_address(0)); \
  }                                                                     \
  TFOPS_SIMT_HOOK __tsan_write##bytes(void* address) {                  \
    simt::OnAccess(address, bytes, true, __builtin_return_address(0));  \
  }                                                                     \
  TFOPS_SIMT_HOOK __tsan_unaligned_read##bytes(void* address) {         \
    simt::OnAccess(address, bytes, false, __builtin_return_address(0)); \
  }                                                                     \
  TFOPS_SIMT_HOOK __tsan_unaligned_write##bytes(void* address) {        \
    simt::OnAccess(address, bytes, true, __builtin_return_address(0));  \
  }
TFOPS_SIMT_ACCESS(1)
TFOPS_SIMT_ACCESS(2)
TFOPS_SIMT_ACCESS(4)
TFOPS_SIMT_ACCESS(8)
TFOPS_SIMT_ACCESS(16)
TFOPS_SIMT_HOOK __tsan_read_range(void* address, size_t bytes) {
  simt::OnAccess(address, bytes, false, __builtin_return_address(0));
}
TFOPS_SIMT_HOOK __tsan_write_range(void* address, size_t bytes) {
  simt::OnAccess(address, bytes, true, __builtin_return_address(0));
}
TFOPS_SIMT_HOOK __tsan_init() { simt::race_detection = true; }
TFOPS_SIMT_HOOK __tsan_func_entry(void*) {}
TFOPS_SIMT_HOOK __tsan_func_exit() {}
TFOPS_SIMT_HOOK __tsan_vptr_update(void**, void*) {}
TFOPS_SIMT_HOOK __tsan_vptr_read(void**) {}
// Host code's atomics: the guards of static variables, reference counts, counters.
#define TFOPS_SIMT_ATOMICS(bits, type)                                                                                 \
  extern "C" __attribute__((visibility("hidden"))) type __tsan_atomic##bits##_load(const volatile type* at, int) {     \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                                      \
  }                                                                                                                    \
  TFOPS_SIMT_HOOK __tsan_atomic##bits##_store(volatile type* at, type value, int) {                                    \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                                                     \
  }                                                                                                                    \
  extern "C" __attribute__((visibility("hidden"))) type __tsan_atomic##bits##_fetch_add(volatile type* at, type value, \
                                                                                        int) {                         \
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                                            \
  }
TFOPS_SIMT_ATOMICS(8, unsigned char)
TFOPS_SIMT_ATOMICS(32, unsigned)
TFOPS_SIMT_ATOMICS(64, uint64_t)
