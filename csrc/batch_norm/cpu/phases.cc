#include "csrc/batch_norm/cpu/phases.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <xmmintrin.h>
#elif !defined(__aarch64__)
#include <cfenv>
#endif

namespace tfops::cpu {
namespace {

// IEEE arithmetic for as long as it lives, whatever the thread was set to: results are the same on each. TensorFlow has
// its threads take denormal numbers for zero, others and GPUs do not.
class IeeeArithmetic {
 public:
  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;

#if defined(__x86_64__)
  // The vector units' register alone: fesetenv() loads the x87 unit's as well, which takes longer than a small call.
  IeeeArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(_MM_MASK_MASK); }  // no exception traps, and all else is 0
  ~IeeeArithmetic() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  // Saves all of the control register, and sets it back: fesetenv() leaves some of its bits, such as that for default
  // NaNs. Cores may have to empty their pipeline to write it, so that is done only if need be.
  IeeeArithmetic() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    if (before_ != 0) Set(0);
  }
  ~IeeeArithmetic() {
    if (before_ != 0) Set(before_);
  }

 private:
  static void Set(uint64_t control) { asm volatile("msr fpcr, %0" : : "r"(control) : "memory"); }

  uint64_t before_;
#else
  IeeeArithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~IeeeArithmetic() { std::fesetenv(&before_); }

 private:
  std::fenv_t before_;
#endif
};

// The calling thread by itself.
void RunAlone(const std::vector<Phase>& phases) {
  const IeeeArithmetic ieee;
  for (const Phase& phase : phases) {
    for (int64_t i = 0; i < phase.items; ++i) phase.body(phase.backwards ? phase.items - 1 - i : i);
  }
}

// Shared by the threads of a call; the last of them frees it. The phases' bodies refer to what lives on the caller's
// stack: they may be called as long as items remain, for so long does the caller wait.
class Call {
 public:
  Call(std::vector<Phase> phases, int64_t threads)
      : phases_(std::move(phases)), threads_(threads), done_(phases_.size()), taken_(phases_.size() * threads) {}

  void Work() { WorkAs(0); }
  void Help() { WorkAs(helpers_.fetch_add(1, std::memory_order_relaxed) + 1); }

 private:
  // A counter on a cache line of its own.
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };

  // Takes items until none are left. Returns when all phases are done; a helper when there is nothing left to take.
  void WorkAs(int64_t thread) {
    const IeeeArithmetic ieee;
    for (size_t p = 0; p < phases_.size(); ++p) {
      int64_t done = 0;
      for (int64_t i = 0; i < threads_; ++i) done += TakeShare(p, (thread + i) % threads_);
      done_[p].value.fetch_add(done, std::memory_order_release);
      if (thread > 0 && p + 1 == phases_.size()) return;
      Await(done_[p].value, phases_[p].items);
    }
  }

  // Does what is left of a share. Returns how many items that were.
  int64_t TakeShare(size_t p, int64_t share) {
    const Phase& phase = phases_[p];
    const int64_t begin = phase.items * share / threads_;
    const int64_t end = phase.items * (share + 1) / threads_;
    std::atomic<int64_t>& taken = taken_[p * threads_ + share].value;
    for (int64_t done = 0;; ++done) {
      const int64_t i = taken.fetch_add(1, std::memory_order_relaxed);
      if (i >= end - begin) return done;
      phase.body(phase.backwards ? end - 1 - i : begin + i);
    }
  }

  // What is awaited is the end of items that other threads are at, some tens of microseconds: too short to sleep. Only
  // if such a thread has lost its core, it takes longer, and the core may be this one.
  static void Await(const std::atomic<int64_t>& done, int64_t items) {
    constexpr int kSpins = 2000;
    for (int spin = 0; done.load(std::memory_order_acquire) < items; ++spin) {
      if (spin >= kSpins) {
        std::this_thread::yield();
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("isb");  // waits about as long; `yield` does nothing on most cores
#endif
      }
    }
  }

  const std::vector<Phase> phases_;
  const int64_t threads_;
  std::atomic<int64_t> helpers_{0};  // that have come
  std::vector<Counter> done_;        // items, by phase
  std::vector<Counter> taken_;       // items, by phase and share
};

}  // namespace

void RunPhases(const Threads& threads, int64_t helpers, std::vector<Phase> phases) {
  int64_t most_items = 0;
  for (const Phase& phase : phases) most_items = std::max(most_items, phase.items);
  helpers = std::min({helpers, static_cast<int64_t>(threads.helpers), most_items - 1});
  if (helpers <= 0) return RunAlone(phases);
  const auto call = std::make_shared<Call>(std::move(phases), helpers + 1);
  for (int64_t i = 0; i < helpers; ++i) threads.schedule([call] { call->Help(); });
  call->Work();
}

}  // namespace tfops::cpu
