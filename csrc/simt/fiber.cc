// Switching stacks.

#include "csrc/simt/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef TFOPS_SIMT_UCONTEXT

// Saves the registers that a callee has to preserve on this stack, and its top in *save; takes `load` for the stack,
// and from it what the same function saved there. A new stack is made to look as if it had been left in this way.
extern "C" void tfops_simt_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.globl tfops_simt_switch
.hidden tfops_simt_switch
.type tfops_simt_switch, @function
tfops_simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size tfops_simt_switch, .-tfops_simt_switch
)");
// main() must find the stack as after a call: 8 bytes below a multiple of 16.
constexpr int kSavedWords = 8;
constexpr int kReturnAddress = 6;
#else
asm(R"(
.text
.globl tfops_simt_switch
.hidden tfops_simt_switch
.type tfops_simt_switch, %function
tfops_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size tfops_simt_switch, .-tfops_simt_switch
)");
constexpr int kSavedWords = 20;
constexpr int kReturnAddress = 11;  // x30
#endif

#endif  // TFOPS_SIMT_UCONTEXT

namespace simt {
namespace {

constexpr uint64_t kCanary = 0x5eed5eed5eed5eed;

#ifdef __SANITIZE_ADDRESS__
// The scheduler's stack, as the last fiber that was started found it.
const void* scheduler_bottom;
size_t scheduler_bytes;
void (*first_main)();
#endif

}  // namespace

Fiber::~Fiber() {
  if (stack_) munmap(stack_, kStackBytes);
}

void Fiber::Start(void (*main)()) {
  if (!stack_) {
    stack_ = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack_ == MAP_FAILED) {
      stack_ = nullptr;
      throw std::bad_alloc();
    }
    std::memcpy(stack_, &kCanary, sizeof(kCanary));
  }
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);  // frames that were abandoned
  fake_stack_ = nullptr;
#endif
#ifdef TFOPS_SIMT_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, main, 0);
#else
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack_) + kStackBytes) - kSavedWords;
  std::memset(top, 0, kSavedWords * sizeof(void*));
  top[kReturnAddress] = reinterpret_cast<void*>(main);
  context_ = top;
#endif
#ifdef __SANITIZE_ADDRESS__
  // The first thing on a new stack is to tell that the switch is over.
  first_main = main;
  const auto enter = +[] {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_bytes);
    first_main();
  };
#ifdef TFOPS_SIMT_UCONTEXT
  makecontext(&context_, enter, 0);
#else
  top[kReturnAddress] = reinterpret_cast<void*>(enter);
#endif
#endif
}

void Fiber::Resume() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, stack_, kStackBytes);
#endif
#ifdef TFOPS_SIMT_UCONTEXT
  swapcontext(&scheduler_, &context_);
#else
  tfops_simt_switch(&scheduler_, context_);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::Suspend(bool last) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, scheduler_bottom, scheduler_bytes);
#endif
#ifdef TFOPS_SIMT_UCONTEXT
  swapcontext(&context_, &scheduler_);
#else
  tfops_simt_switch(&context_, scheduler_);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_bottom, &scheduler_bytes);
#endif
  static_cast<void>(last);
}

bool Fiber::Overflowed() const { return stack_ && std::memcmp(stack_, &kCanary, sizeof(kCanary)) != 0; }

}  // namespace simt
