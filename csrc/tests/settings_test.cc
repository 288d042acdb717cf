// What the process remembers of settings and choices.

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#include "csrc/batch_norm/cuda/policy.h"
#include "csrc/batch_norm/cuda/prepare.h"
#include "csrc/tests/problems.h"
#include "csrc/tests/testing.h"

// The number of allocations of the whole program.
static int64_t allocations = 0;

__attribute__((noinline)) void* operator new(size_t bytes) {
  ++allocations;
  if (void* const memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* memory) noexcept { std::free(memory); }
__attribute__((noinline)) void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace tfops::cuda {
namespace {

TEST(WrongSettingsAreNamed) {
  Settings settings;
  const auto expect = [&](const PolicySettings& given, const std::string& message) {
    testing::about = message;
    const Status status = Apply(given, &settings);
    EXPECT_EQ(status.code, StatusCode::kInvalidArgument);
    EXPECT_TRUE(status.message.find(message) != std::string::npos);
    EXPECT_TRUE(!settings.forced && settings.cluster == 0 && settings.tuning.launch == PolicyTuning().launch);
  };
  expect({"fastest", 0, 0, {}}, "tier must be one_block, cluster, grid or streaming, but it is fastest");
  expect({"", 3, 0, {}}, "cluster must be 2, 4, 8, 16, or 0 for any size, but it is 3");
  expect({"", 0, -1, {}}, "free_multiprocessors must be >= 0, but it is -1");
  expect({"", 0, 0, {{"launch", 1}, {"lunch", 1}}}, "cache_share, but it is lunch");
  expect({"", 0, 0, {{"launch", 0}}}, "the tuning's launch must be a finite number > 0, but it is 0");
  expect({"", 0, 0, {{"latency", HUGE_VAL}}}, "the tuning's latency must be a finite number > 0, but it is inf");
  expect({"", 0, 0, {{"cache_share", 1.5}}}, "the tuning's cache_share must be a number from 0 to 1, but it is 1.5");
}

TEST(EnvironmentSetsThePolicy) {
  Settings settings;
  setenv("TFOPS_TIER", "grid", 1);
  setenv("TFOPS_FREE_MULTIPROCESSORS", "12", 1);
  EXPECT_TRUE(ReadEnvironment(&settings).ok());
  EXPECT_TRUE(settings.forced && settings.tier == Tier::kGrid && settings.free_multiprocessors == 12);
  for (const char* wrong : {"-1", "many", "12 of 132", "99999999999999999999"}) {
    setenv("TFOPS_FREE_MULTIPROCESSORS", wrong, 1);
    EXPECT_EQ(ReadEnvironment(&settings).message,
              "TFOPS_FREE_MULTIPROCESSORS must be a whole number >= 0, but it is " + std::string(wrong));
  }
  unsetenv("TFOPS_FREE_MULTIPROCESSORS");
  setenv("TFOPS_TIER", "fastest", 1);
  EXPECT_EQ(ReadEnvironment(&settings).message,
            "TFOPS_TIER must be one_block, cluster, grid or streaming, but it is fastest");
  unsetenv("TFOPS_TIER");
}

// Calls allocate nothing from the second one on for a problem, whatever came of the first.
TEST(CallsAllocateNothing) {
  Random random(7);
  Problem problem;
  for (int i = 0; i < 100; ++i) {
    DrawSettings(&random, &problem);
    problem.outer = 1 + random.Below(10'000);
    problem.channels = 1 + random.Below(100);
    Device device;
    device.number = 0;
    std::shared_ptr<const Prepared> prepared;
    EXPECT_TRUE(Prepare(problem, Pass::kBackward, device, &prepared).ok());
    const int64_t before = allocations;
    EXPECT_TRUE(Prepare(problem, Pass::kBackward, device, &prepared).ok());
    CountCall(prepared->choice[1].tier);
    EXPECT_EQ(allocations, before);
  }
  EXPECT_LT(0, allocations);
}

}  // namespace
}  // namespace tfops::cuda
