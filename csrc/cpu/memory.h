// Scratch memory. The functions lie in dispatch.cpp, outside the code of any instruction set.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace vicinal::cpu {

// At least `bytes` bytes, aligned to 64, of the calling thread: kept between calls, so that a call does not
// pay for fresh pages. What it holds is not defined.
void* thread_scratch(size_t bytes);

// Hands out consecutive aligned pieces of one block, with a gap after each; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T>
  T* take(int64_t n) {
    const uintptr_t begin = base_ + used_, size = static_cast<size_t>(n) * sizeof(T);
    used_ += (size + 127) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
    if (base_) {  // the block may have been carved before
      __asan_unpoison_memory_region(reinterpret_cast<void*>(begin), size);
      __asan_poison_memory_region(reinterpret_cast<void*>(begin + size), base_ + used_ - begin - size);
    }
#endif
    return reinterpret_cast<T*>(begin);
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

}  // namespace vicinal::cpu
