// The machine that kernels run on: a fiber for each CUDA thread, and what the threads of a warp, a block, a cluster and
// a grid do together. Device code calls this through CUDA's own words (include/) and through intrinsics.cuh.

#ifndef TFOPS_SIMT_MACHINE_H_
#define TFOPS_SIMT_MACHINE_H_

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

// The variables of the thread that runs now.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
inline constexpr int warpSize = 32;

namespace simt {

// A place in the kernel's source. As a default argument, Here() is that of the call.
struct Position {
  const char* file;
  int line;

  static constexpr Position Here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Position& other) const { return line == other.line && file == other.file; }
};

// --- For device code ---------------------------------------------------------------------------------------------

void BlockBarrier(Position position);
void ClusterBarrier(Position position);
void GridBarrier(Position position);

// Lets the other threads run, now and then.
void MayYield();

// Copies to shared memory that are made when they are waited for, so that whoever does not wait finds what was there
// before. NextCopy() says of one of a group that is not among the last `pending`, or returns false.
void BeginCopy(void* to, const void* from);
void CommitCopies();
bool NextCopy(size_t pending, void** to, const void** from);

unsigned ClusterSize();
unsigned ClusterRank();
unsigned Lane();

// What all lanes of `mask` have deposited, by lane; each waits for the others. Valid until the thread's next call.
struct Deposits {
  unsigned mask;
  const uint64_t* values;
};
Deposits Exchange(const char* operation, unsigned mask, uint64_t value, Position position);

char* DynamicShared();
// The block's own variable that `key` stands for: from the heap, of this size exactly, filled with NaN.
void* StaticShared(const void* key, size_t bytes, size_t alignment);
void* RemoteShared(const void* local, unsigned rank);

enum class Access { kLoad, kStore };
// Fails for a misaligned access of the thread that runs; counts its access as part of its warp's.
void OnMisaligned(const void* address, size_t bytes);
void Count(const void* address, size_t bytes, Access access);
extern bool counting;

extern int64_t loads;  // calls of the host that would load a kernel, beside launches

__attribute__((always_inline)) inline void OnGlobalAccess(const void* address, size_t bytes, Access access) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) OnMisaligned(address, bytes);
  if (counting) Count(address, bytes, access);
}

// Ends the launch: the message becomes cudaGetErrorString()'s.
[[noreturn]] void Fail(const std::string& message);

// --- For the launcher --------------------------------------------------------------------------------------------

struct Grid {
  const void* kernel = nullptr;
  dim3 grid;
  dim3 block;
  unsigned cluster = 1;
  size_t dynamic_shared = 0;
  bool cooperative = false;
};

// Runs `thread` once for each thread of the grid, in an order that the seed decides. Returns "", or what went wrong.
std::string Run(const Grid& grid, const std::function<void()>& thread);

void SetSeed(uint64_t seed);

// The bytes of static shared memory of a kernel that has run.
size_t StaticSharedBytes(const void* kernel);
// A kernel's name, as written in the source.
std::string KernelName(const void* kernel);

}  // namespace simt

#endif  // TFOPS_SIMT_MACHINE_H_
