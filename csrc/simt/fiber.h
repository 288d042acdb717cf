// A fiber: a stack of its own, and a switch to it and back that costs some ten nanoseconds.
//
// The switch is a dozen instructions on x86-64 and AArch64. Elsewhere, or with TFOPS_SIMT_UCONTEXT, it is
// swapcontext(), which makes system calls, and is several times slower.

#ifndef TFOPS_SIMT_FIBER_H_
#define TFOPS_SIMT_FIBER_H_

#include <cstddef>

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(TFOPS_SIMT_UCONTEXT)
#define TFOPS_SIMT_UCONTEXT
#endif

#ifdef TFOPS_SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  // Under AddressSanitizer frames are several times as large.
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kStackBytes = 256 << 10;
#else
  static constexpr size_t kStackBytes = 64 << 10;
#endif

  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next Resume() calls main(), which must not return; what the fiber ran before is forgotten.
  void Start(void (*main)());

  // Called by the scheduler: runs the fiber until it calls Suspend().
  void Resume();
  // Called by the fiber: returns to Resume(). `last` says that it will not be resumed.
  void Suspend(bool last = false);

  // Whether the address is on the fiber's stack.
  bool Holds(const void* address) const {
    return static_cast<size_t>(static_cast<const char*>(address) - static_cast<const char*>(stack_)) < kStackBytes;
  }
  // Whether the fiber has used its stack to the end, or beyond.
  bool Overflowed() const;

 private:
  void* stack_ = nullptr;
#ifdef TFOPS_SIMT_UCONTEXT
  ucontext_t context_;
  ucontext_t scheduler_;
#else
  void* context_ = nullptr;
  void* scheduler_ = nullptr;
#endif
  // The fake stacks that AddressSanitizer has beside the stacks that are switched away from.
  void* fake_stack_ = nullptr;
  void* scheduler_fake_stack_ = nullptr;
};

}  // namespace simt

#endif  // TFOPS_SIMT_FIBER_H_
