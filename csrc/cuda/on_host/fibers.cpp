// Stack switch by hand for x86-64: ucontext's takes 170 ns because it saves the signal mask, this one a few.
#include "fibers.h"

#include <sys/mman.h>

#include <cstdlib>

extern "C" {  // present when the program is linked with the sanitizer
#define WEAK __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
WEAK void __asan_poison_memory_region(const volatile void* begin, size_t size);
WEAK void __asan_unpoison_memory_region(const volatile void* begin, size_t size);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* tag);
WEAK void __tsan_release(void* tag);

void vicinal_switch_stack(void** save, void* load);
}

asm(R"(
.text
.globl vicinal_switch_stack
.hidden vicinal_switch_stack
.type vicinal_switch_stack, @function
vicinal_switch_stack:
  endbr64
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
.size vicinal_switch_stack, .-vicinal_switch_stack
)");

namespace vicinal::on_host {

Stack new_stack() {
  constexpr size_t bytes = 256 * 1024, guard = 4096;
  void* memory = mmap(nullptr, bytes + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  mprotect(memory, guard, PROT_NONE);
  Stack stack;
  stack.bottom = static_cast<unsigned char*>(memory) + guard;
  stack.bytes = bytes;
  if (__tsan_create_fiber) stack.tsan = __tsan_create_fiber(0);
  return stack;
}

void start_at(Stack& stack, void (*entry)()) {
  unpoison(stack.bottom, stack.bytes);  // frames that a failed launch left behind
  auto* top = reinterpret_cast<void**>(stack.bottom + stack.bytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  stack.sp = top - 8;
  stack.fake = nullptr;
}

void switch_stack(Stack& from, Stack& to, bool for_good) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake, to.bottom, to.bytes);
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, 1);  // 1: the switch itself orders nothing
  vicinal_switch_stack(&from.sp, to.sp);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
}

void entered(Stack& main) {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (main.bottom) return;
  main.bottom = static_cast<unsigned char*>(const_cast<void*>(bottom));
  main.bytes = bytes;
}

void name_main(Stack& main) {
  main = Stack{};
  if (__tsan_get_current_fiber) main.tsan = __tsan_get_current_fiber();
}

bool has_race_detector() { return __tsan_create_fiber != nullptr; }

void release(void* tag) {
  if (__tsan_release) __tsan_release(tag);
}

void acquire(void* tag) {
  if (__tsan_acquire) __tsan_acquire(tag);
}

void poison(void* begin, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(begin, bytes);
}

void unpoison(void* begin, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(begin, bytes);
}

}  // namespace vicinal::on_host
