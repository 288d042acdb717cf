#include "csrc/batch_norm/cpu/phases.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <utility>

namespace tfops::cpu {
namespace {

// Shared by the threads of a call; the last of them frees it. The phases' bodies refer to what lives on the caller's
// stack: they may be called as long as items remain, for so long does the caller wait.
class Call {
 public:
  explicit Call(std::vector<Phase> phases) : phases_(std::move(phases)), progress_(phases_.size()) {}

  // Takes items until none are left. Returns when all phases are done; a helper when there is nothing left to take.
  void Work(bool is_helper) {
    for (size_t p = 0; p < phases_.size(); ++p) {
      const Phase& phase = phases_[p];
      Progress& progress = progress_[p];
      for (int64_t i = progress.taken.fetch_add(1, std::memory_order_relaxed); i < phase.items;
           i = progress.taken.fetch_add(1, std::memory_order_relaxed)) {
        phase.body(i);
        progress.done.fetch_add(1, std::memory_order_release);
      }
      if (is_helper && p + 1 == phases_.size()) return;
      Await(progress.done, phase.items);
    }
  }

 private:
  // On cache lines of their own, for all threads write to them.
  struct alignas(64) Progress {
    std::atomic<int64_t> taken{0};
    alignas(64) std::atomic<int64_t> done{0};
  };

  // What is awaited is the end of items that other threads are at, some tens of microseconds: too short to sleep. Only
  // if such a thread has lost its core, it takes longer, and the core may be this one.
  static void Await(const std::atomic<int64_t>& done, int64_t items) {
    constexpr int kSpins = 2000;
    for (int spin = 0; done.load(std::memory_order_acquire) < items; ++spin) {
      if (spin >= kSpins) {
        std::this_thread::yield();
      } else {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
      }
    }
  }

  std::vector<Phase> phases_;
  std::vector<Progress> progress_;
};

}  // namespace

void RunPhases(const Threads& threads, int64_t helpers, std::vector<Phase> phases) {
  int64_t most_items = 0;
  for (const Phase& phase : phases) most_items = std::max(most_items, phase.items);
  helpers = std::min({helpers, static_cast<int64_t>(threads.helpers), most_items - 1});
  if (helpers <= 0) {
    for (const Phase& phase : phases) {
      for (int64_t i = 0; i < phase.items; ++i) phase.body(i);
    }
    return;
  }
  const auto call = std::make_shared<Call>(std::move(phases));
  for (int64_t i = 0; i < helpers; ++i) threads.schedule([call] { call->Work(/*is_helper=*/true); });
  call->Work(/*is_helper=*/false);
}

}  // namespace tfops::cpu
