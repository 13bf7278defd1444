// Stacks that a CUDA thread of the emulator runs on, and what the sanitizers have to be told about them.
#pragma once

#include <cstddef>

namespace vicinal::on_host {

struct Stack {
  unsigned char* bottom = nullptr;  // null: the stack of the program itself
  size_t bytes = 0;
  void* sp = nullptr;
  void* fake = nullptr;  // AddressSanitizer's shadow of locals
  void* tsan = nullptr;  // ThreadSanitizer's identity
};

Stack new_stack();
void start_at(Stack& stack, void (*entry)());  // the next switch to it calls entry, which never returns
void switch_stack(Stack& from, Stack& to, bool for_good);
void entered(Stack& main);  // first call of every entry; main is what the first entry of a launch came from
void name_main(Stack& main);

// Hooks of the sanitizers; without one they do nothing.
bool has_race_detector();
void release(void* tag);
void acquire(void* tag);
void poison(void* begin, size_t bytes);
void unpoison(void* begin, size_t bytes);

}  // namespace vicinal::on_host
