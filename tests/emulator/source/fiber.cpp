#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace emulator {

// ---- stacks ---------------------------------------------------------------------------------------------

Stacks::Stacks() : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
  void* mapping =
      mmap(nullptr, kMost * (page_ + kBytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(mapping);
}

Stacks::~Stacks() {
  forget_frames();
  munmap(mapping_, kMost * (page_ + kBytes));
}

char* Stacks::stack(int index) {
  for (; in_use_ <= index; ++in_use_) {
    char* fresh = mapping_ + static_cast<size_t>(in_use_) * (page_ + kBytes) + page_;
    if (mprotect(fresh, kBytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
  return mapping_ + static_cast<size_t>(index) * (page_ + kBytes) + page_;
}

void Stacks::forget_frames() {
  for (int i = 0; i < in_use_; ++i) sanitizer::unpoison(stack(i), kBytes);
}

// ---- switching ------------------------------------------------------------------------------------------

#if !EMULATOR_UCONTEXT
// Saves what the x86-64 ABI lets a callee keep (six registers and the two control words of floating point) on
// the stack that is left, and takes it from the stack that is entered.
extern "C" void moe_route_emulator_switch(void** left, void* entered);
__asm__(
    ".text\n"
    ".globl moe_route_emulator_switch\n"
    ".hidden moe_route_emulator_switch\n"
    ".type moe_route_emulator_switch,@function\n"
    "moe_route_emulator_switch:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  sub $8, %rsp\n  stmxcsr (%rsp)\n  fnstcw 4(%rsp)\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  ldmxcsr (%rsp)\n  fldcw 4(%rsp)\n  add $8, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  ret\n"
    ".size moe_route_emulator_switch, .-moe_route_emulator_switch\n");

void Fiber::prepare(char* stack, int index, void (*entry)()) {
  stack_ = stack, stack_bytes_ = Stacks::kBytes, fake_stack_ = nullptr;
  if (thread_ == nullptr) thread_ = sanitizer::new_thread(), own_thread_ = true;
  const uintptr_t top = reinterpret_cast<uintptr_t>(stack + Stacks::kBytes) & ~uintptr_t{63};
  auto* frame = reinterpret_cast<uint64_t*>(top) - index % 61 * 24;  // a multiple of 16 bytes
  *--frame = 0;                                  // entry has no caller: unwinding ends here
  *--frame = reinterpret_cast<uint64_t>(entry);  // where the switch returns to
  for (int i = 0; i < 6; ++i) *--frame = 0;      // the registers
  uint32_t control_sse = 0;
  uint16_t control_x87 = 0;
  __asm__ volatile("stmxcsr %0" : "=m"(control_sse));
  __asm__ volatile("fnstcw %0" : "=m"(control_x87));
  *--frame = uint64_t{control_x87} << 32 | control_sse;
  stack_pointer_ = frame;
}
#else
void Fiber::prepare(char* stack, int index, void (*entry)()) {
  stack_ = stack, stack_bytes_ = Stacks::kBytes, fake_stack_ = nullptr;
  if (thread_ == nullptr) thread_ = sanitizer::new_thread(), own_thread_ = true;
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = Stacks::kBytes - static_cast<size_t>(index % 61) * 192;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}
#endif

void Fiber::switch_to(Fiber& to, void** fake_stack) {
  sanitizer::start_switch(fake_stack, to.stack_, to.stack_bytes_);
  sanitizer::turn_to_thread(to.thread_);
#if EMULATOR_UCONTEXT
  swapcontext(&context_, &to.context_);
#else
  moe_route_emulator_switch(&stack_pointer_, to.stack_pointer_);
#endif
}

void Fiber::hand_over(Fiber& to) {
  switch_to(to, &fake_stack_);
  sanitizer::finish_switch(fake_stack_, nullptr, nullptr);
}

void Fiber::end(Fiber& to) {
  switch_to(to, nullptr);
  std::abort();  // nobody hands back to a fiber that has ended
}

void Fiber::arrive(Fiber& caller_of_all) {
  const bool known = caller_of_all.stack_ != nullptr;
  sanitizer::finish_switch(nullptr, known ? nullptr : &caller_of_all.stack_,
                           known ? nullptr : &caller_of_all.stack_bytes_);
}

// ---- ThreadSanitizer ------------------------------------------------------------------------------------

void Fiber::adopt() { thread_ = sanitizer::this_thread(); }

void Fiber::order(const std::vector<const Fiber*>& fibers, void* token) {
  void* const running = sanitizer::this_thread();
  for (const Fiber* fiber : fibers) sanitizer::turn_to_thread(fiber->thread_), sanitizer::release(token);
  for (const Fiber* fiber : fibers) sanitizer::turn_to_thread(fiber->thread_), sanitizer::acquire(token);
  sanitizer::turn_to_thread(running);
}

void Fiber::forget() {
  if (own_thread_) sanitizer::forget_thread(thread_);
  thread_ = nullptr, own_thread_ = false;
}

}  // namespace emulator
