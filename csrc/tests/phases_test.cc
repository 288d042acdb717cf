// How the CPU's items are shared among threads: those that come in time, late, or never.

#include "csrc/batch_norm/cpu/phases.h"

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/tests/testing.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace tfops::cpu {
namespace {

using Tasks = std::vector<std::function<void()>>;

// Runs phases of so many items. Every item has to run once, when all of the phases before are done, whatever becomes of
// the tasks that schedule(task) is given; end() is called afterwards, and nothing may run in it.
void ExpectEachItemOnce(int helpers, const std::function<void(std::function<void()>)>& schedule,
                        const std::function<void()>& end) {
  const std::vector<int64_t> counts = {5, 0, 64, 1, 33};
  std::vector<std::vector<std::atomic<int>>> runs;
  for (const int64_t count : counts) runs.emplace_back(count);
  std::atomic<int64_t> done{0};
  std::atomic<bool> early{false}, late{false}, over{false};
  std::vector<Phase> phases;
  int64_t before = 0;
  for (size_t p = 0; p < counts.size(); ++p) {
    const auto body = [&, p, before](int64_t item) {
      if (done < before) early = true;
      if (over) late = true;
      ++runs[p][item];
      ++done;
    };
    phases.push_back({counts[p], body, /*backwards=*/p % 2 == 0});
    before += counts[p];
  }
  std::atomic<int> asked{0};
  Threads threads;
  threads.helpers = helpers;
  threads.schedule = [&](std::function<void()> task) {
    ++asked;
    schedule(std::move(task));
  };
  RunPhases(threads, /*helpers=*/7, phases);
  over = true;
  end();
  for (const auto& phase : runs) {
    for (const auto& count : phase) EXPECT_EQ(count.load(), 1);
  }
  EXPECT_TRUE(!early);
  EXPECT_TRUE(!late);
  EXPECT_LE(asked.load(), std::min(helpers, 7));
}

TEST(EachItemRunsOnceWithoutHelp) {
  for (const int helpers : {0, 1, 3, 100}) {
    ExpectEachItemOnce(helpers, [](std::function<void()>) {}, [] {});
  }
}

TEST(EachItemRunsOnceIfHelpersComeLate) {
  for (const int helpers : {1, 3, 100}) {
    Tasks tasks;
    ExpectEachItemOnce(
        helpers, [&](std::function<void()> task) { tasks.push_back(std::move(task)); },
        [&] {
          for (const auto& task : tasks) task();
        });
  }
}

TEST(EachItemRunsOnceIfHelpersComeAtOnce) {
  for (int repeat = 0; repeat < 200; ++repeat) {
    std::vector<std::thread> started;
    ExpectEachItemOnce(
        1 + repeat % 4, [&](std::function<void()> task) { started.emplace_back(std::move(task)); },
        [&] {
          for (std::thread& thread : started) thread.join();
        });
  }
}

#if defined(__x86_64__) || defined(__aarch64__)

// The control register of the arithmetic at hand, without the flags of what has happened; and a setting of it that
// flushes denormals (also those of halves), makes all NaNs the default one, and rounds toward zero.
#if defined(__x86_64__)
constexpr uint64_t kIeee = _MM_MASK_MASK, kOther = _MM_MASK_MASK | _MM_FLUSH_ZERO_MASK | 0x40 | _MM_ROUND_TOWARD_ZERO;
uint64_t Control() { return _mm_getcsr() & ~uint64_t{_MM_EXCEPT_MASK}; }
void SetControl(uint64_t control) { _mm_setcsr(static_cast<unsigned>(control)); }
#else
constexpr uint64_t kIeee = 0, kOther = 1 << 19 | 3 << 22 | 1 << 24 | 1 << 25;
uint64_t Control() {
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  return control;
}
void SetControl(uint64_t control) { asm volatile("msr fpcr, %0" : : "r"(control) : "memory"); }
#endif

// Whatever a thread is set to, items run by IEEE rules, and the thread has its setting back afterwards.
TEST(ItemsRunInIeeeArithmetic) {
  const uint64_t before = Control();
  for (const uint64_t setting : {kOther, kIeee}) {
    for (const int helpers : {0, 1}) {
      SetControl(setting);
      const uint64_t set = Control();  // a bit that the processor does not have is 0
      volatile double tiny = 1e-308;
      std::vector<uint64_t> seen;
      std::vector<double> quotients;
      Threads threads;
      threads.helpers = helpers;
      threads.schedule = [](const std::function<void()>&) {};
      RunPhases(threads, helpers, {{3, [&](int64_t) {
                                      seen.push_back(Control());
                                      quotients.push_back(tiny / 4);
                                    }}});
      EXPECT_EQ(Control(), set);
      SetControl(before);
      for (const uint64_t control : seen) EXPECT_EQ(control, kIeee);
      for (const double quotient : quotients) EXPECT_LT(0.0, quotient);
      EXPECT_EQ(seen.size(), size_t{3});
    }
  }
}

#endif

// Who has no help goes through items in order, or in the reverse where a phase says so.
TEST(PhasesMayGoBackwards) {
  std::vector<int64_t> items;
  const auto body = [&items](int64_t item) { items.push_back(item); };
  RunPhases({}, 0, {{3, body}, {3, body, /*backwards=*/true}});
  EXPECT_TRUE((items == std::vector<int64_t>{0, 1, 2, 2, 1, 0}));
}

}  // namespace
}  // namespace tfops::cpu
