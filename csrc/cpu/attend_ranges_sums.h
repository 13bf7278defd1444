// What the pass over queries of a backward leaves behind: numbers for the pass over keys, and partial sums.
#pragma once
#include <cstdlib>

#include "scalar.h"
#include "schedule.h"

namespace vicinal::VICINAL_ISA {

template <class T>
T* allocate(int64_t n) {
  T* data = static_cast<T*>(std::malloc(static_cast<size_t>(n + 1) * sizeof(T)));
  if (!data) std::abort();
  return data;
}

// What the pass over queries leaves behind. Segments of extra: index of the run of items + batch.
template <class T>
struct Left {
  T *inverse, *delta;  // [B, n_q, heads]
  T* bias = nullptr;   // [runs][heads][table_stride]
  T* extra = nullptr;  // [segments][n_extra][heads][D + Dv]
  int64_t table_stride, bias_stride, extra_stride;

  Left(const AttendBwd& p, const Schedule& plan, int64_t padded_table) {
    const Attend& a = p.a;
    inverse = allocate<T>(a.batch * a.n_q * a.heads), delta = allocate<T>(a.batch * a.n_q * a.heads);
    table_stride = padded_table, bias_stride = a.heads * padded_table;
    extra_stride = int64_t(a.n_extra) * a.heads * (a.head_dim + a.head_dim_v);
    if (p.dbias) bias = allocate<T>(plan.item_chunks * bias_stride);
    if (a.n_extra && (p.dextra_k.data || p.dextra_v.data))
      extra = allocate<T>((plan.item_chunks + a.batch) * extra_stride);
  }
  ~Left() { std::free(inverse), std::free(delta), std::free(bias), std::free(extra); }
  Left(const Left&) = delete;
};

// dbias and dextra, the order of each sum is the order of the runs.
template <class T>
void add_up(const AttendBwd& p, const Schedule& plan, const Left<T>& left) {
  const Attend& a = p.a;
  const int32_t D = a.head_dim, Dv = a.head_dim_v, group = a.heads / a.kv_heads;
#pragma omp for schedule(static)
  for (int32_t h = 0; h < a.heads; ++h) {
    T* to = left.bias ? static_cast<T*>(p.dbias) + h * a.bias_size : nullptr;
    for (int64_t t = 0; to && t < a.bias_size; ++t) to[t] = 0;
    for (int64_t c = 0; to && c < plan.item_chunks; ++c) {
      const T* from = left.bias + c * left.bias_stride + h * left.table_stride;
      for (int64_t t = 0; t < a.bias_size; ++t) to[t] += from[t];
    }
    if (!left.extra || h % group) continue;
    for (int64_t b = 0; b < a.batch; ++b) {
      const int64_t first = b * a.plan.n_rows / plan.chunk_items;
      const int64_t last = ((b + 1) * a.plan.n_rows - 1) / plan.chunk_items;
      for (int32_t e = 0; e < a.n_extra; ++e) {
        T* dk = p.dextra_k.data ? row_of<T>(p.dextra_k, b, e, h / group) : nullptr;
        T* dv = p.dextra_v.data ? row_of<T>(p.dextra_v, b, e, h / group) : nullptr;
        for (int32_t d = 0; dk && d < D; ++d) dk[d] = 0;
        for (int32_t d = 0; dv && d < Dv; ++d) dv[d] = 0;
        for (int32_t own = h; own < h + group; ++own) {
          for (int64_t c = first; c <= last; ++c) {
            const T* from =
                left.extra + (c + b) * left.extra_stride + (int64_t(e) * a.heads + own) * (D + Dv);
            for (int32_t d = 0; dk && d < D; ++d) dk[d] += from[d];
            for (int32_t d = 0; dv && d < Dv; ++d) dv[d] += from[D + d];
          }
        }
      }
    }
  }
}

}  // namespace vicinal::VICINAL_ISA
