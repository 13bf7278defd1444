// Scratch memory. The functions lie in dispatch.cpp, outside the code of any instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace vicinal::cpu {

// At least `bytes` bytes, aligned to 64, of the calling thread: kept between calls, so that a call does not
// pay for fresh pages. What it holds is not defined.
void* thread_scratch(size_t bytes);

// Hands out consecutive aligned pieces of one block; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(n) * sizeof(T) + 127) / 64 * 64;
    return p;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace vicinal::cpu
