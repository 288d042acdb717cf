// How the CPU's items are shared among threads: those that come in time, late, or never.

#include "csrc/batch_norm/cpu/phases.h"

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/tests/testing.h"

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

// Who has no help goes through items in order, or in the reverse where a phase says so.
TEST(PhasesMayGoBackwards) {
  std::vector<int64_t> items;
  const auto body = [&items](int64_t item) { items.push_back(item); };
  RunPhases({}, 0, {{3, body}, {3, body, /*backwards=*/true}});
  EXPECT_TRUE((items == std::vector<int64_t>{0, 1, 2, 2, 1, 0}));
}

}  // namespace
}  // namespace tfops::cpu
