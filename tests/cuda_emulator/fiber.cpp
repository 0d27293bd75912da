#include "fiber.h"

#if defined(__x86_64__)
// Saves what a call must preserve, exchanges the stacks, and returns on the other one.
extern "C" void cuda_emulator_exchange_stacks(void** save, void* to);
asm(R"(
.text
.hidden cuda_emulator_exchange_stacks
.globl cuda_emulator_exchange_stacks
.type cuda_emulator_exchange_stacks, @function
cuda_emulator_exchange_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulator_exchange_stacks, .-cuda_emulator_exchange_stacks
)");
#endif

namespace cuda_emulator {
namespace {

void (*starting)() = nullptr;

#if defined(__SANITIZE_ADDRESS__)
Fiber* arrived_from = nullptr;
#endif

}  // namespace

void Fiber::start(void (*entry)()) {
  if (!stack_) {
    void* found = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(found);
  }
  forget();
#if defined(__SANITIZE_ADDRESS__)
  fake_stack_ = nullptr;
  bottom_ = stack_;
  size_ = kStack;
#endif
  starting = entry;
  const auto run = [] {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &arrived_from->bottom_, &arrived_from->size_);
#endif
    starting();
  };
#if defined(__x86_64__)
  // As if `run` had been called: its address to return to, and six registers.
  void** top = reinterpret_cast<void**>(stack_ + kStack) - 8;
  for (int i = 0; i < 6; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(static_cast<void (*)()>(run));
  top[7] = nullptr;
  top_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStack;
  context_.uc_link = nullptr;
  makecontext(&context_, static_cast<void (*)()>(run), 0);
#endif
}

void switch_to(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  arrived_from = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
#if defined(__x86_64__)
  cuda_emulator_exchange_stacks(&from.top_, to.top_);
#else
  swapcontext(&from.context_, &to.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack_, &arrived_from->bottom_, &arrived_from->size_);
#endif
}

}  // namespace cuda_emulator
