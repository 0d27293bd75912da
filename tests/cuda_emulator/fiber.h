// A stack of its own and a place on it to go on from. On x86-64 a switch is a dozen instructions; elsewhere it is ucontext's.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emulator {

class Fiber {
 public:
  static constexpr size_t kStack = 256 * 1024;

  Fiber() = default;
  Fiber(Fiber&& other) noexcept : stack_(std::exchange(other.stack_, nullptr)) {}
  Fiber& operator=(Fiber&& other) noexcept {
    std::swap(stack_, other.stack_);
    return *this;
  }
  ~Fiber() {
    if (!stack_) return;
    forget();
    munmap(stack_, kStack);
  }

  // Goes to `entry`, which never returns, when it is switched to next.
  void start(void (*entry)());
  bool owns(uintptr_t at) const { return at - reinterpret_cast<uintptr_t>(stack_) < kStack; }

  friend void switch_to(Fiber& from, Fiber& to);

 private:
  // What AddressSanitizer knows of functions that never returned: the stack is used again, or its addresses are.
  void forget() {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack_, kStack);
#endif
  }

  char* stack_ = nullptr;   // null: the stack of the thread itself
#if defined(__x86_64__)
  void* top_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
};

void switch_to(Fiber& from, Fiber& to);

}  // namespace cuda_emulator
