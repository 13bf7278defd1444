// Huge pages below large outputs.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "attend.h"

namespace vicinal::cpu {

// The bytes from the first element that a kernel writes to the last one.
struct Span {
  uintptr_t begin = 0, end = 0;

  static Span of(const Rows& t, int64_t batch, int64_t tokens, int64_t heads, int64_t dim, int64_t bytes) {
    if (!t.data || batch * tokens * heads * dim <= 0) return {};
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data);
    const int64_t last = (batch - 1) * t.stride_b + (tokens - 1) * t.stride_n + (heads - 1) * t.stride_h;
    return {begin, begin + static_cast<uintptr_t>((last + dim) * bytes)};
  }
  Span with(const Span& other) const {  // one span where they overlap, as in a packed gradient
    if (other.begin >= end || begin >= other.end) return *this;
    return {begin < other.begin ? begin : other.begin, end > other.end ? end : other.end};
  }
};

// Asks for huge pages below an output that the allocator may just have taken from the system: the faults of
// small ones cost as much as the kernel (67 against 13 ms for 144 MB on a virtual Zen 5, one thread).
inline void advise_huge(const Span& span) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t(2) << 20, kLeast = 2 * kPage;
  const uintptr_t begin = (span.begin + kPage - 1) & ~(kPage - 1), end = span.end & ~(kPage - 1);
  if (span.end - span.begin >= kLeast && begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice: it may fail
#else
  (void)span;
#endif
}

inline int64_t bytes_of(DType dtype) { return dtype == kF64 ? 8 : dtype == kF32 ? 4 : 2; }

}  // namespace vicinal::cpu
