// Where the rows of one plan row and head lie in the tensors.
#pragma once
#include "memory.h"
#include "scalar.h"

namespace vicinal::VICINAL_ISA {

// Pads and excluded keys point to zeros, extra keys to theirs. k and v have a whole number of vectors of
// entries, the last ones zeros. Null tensors have no entries.
template <class S>
struct Addresses {
  int64_t b = -1, row = -1;  // of the plan row; -1: none
  int32_t h = -1, nq = 0, nk = 0;
  const S **q, **dout, **k, **v;
  S **to_q, **to_k, **to_v;  // of keys without a token: null

  void carve(cpu::Arena& arena, int64_t q_most, int64_t k_most, bool backward) {
    q = arena.take<const S*>(q_most), dout = backward ? arena.take<const S*>(q_most) : nullptr;
    k = arena.take<const S*>(k_most), v = arena.take<const S*>(k_most), to_q = arena.take<S*>(q_most);
    to_k = backward ? arena.take<S*>(k_most) : nullptr, to_v = backward ? arena.take<S*>(k_most) : nullptr;
  }
};

// Rows `token` of t; a negative token gives an address that means nothing.
template <class S, class P>
inline void locate_rows(const Rows& t, int64_t b, int32_t h, const int32_t* token, int32_t n, P** to) {
  const uintptr_t base = reinterpret_cast<uintptr_t>(row_of<S>(t, b, 0, h));
  const int64_t step = t.stride_n * static_cast<int64_t>(sizeof(S));
  for (int32_t i = 0; i < n; ++i)
    to[i] = reinterpret_cast<P*>(base + static_cast<uintptr_t>(token[i] * step));
}

// Every line of a row. Inlined by order: GCC takes a function that only prefetches for one without effect and
// drops its calls.
template <int kWrite, class S>
[[gnu::always_inline]] inline void prefetch_row(const S* row, int32_t d) {
  const char* at = reinterpret_cast<const char*>(row);
  const int32_t bytes = d * static_cast<int32_t>(sizeof(S)), whole = (bytes + 63) / 64 * 64;
  for (int32_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, kWrite, 3);
  if (static_cast<int32_t>(reinterpret_cast<uintptr_t>(at) & 63) + bytes > whole)
    __builtin_prefetch(at + bytes - 1, kWrite, 3);
}

}  // namespace vicinal::VICINAL_ISA
