// What the forward and the backward of context attention share: the keys of a plan row, packed, and the
// scores of one query against them.
//
// Lanes are the head dimension. Windows of ConDaFormer's planes hold 15 points of 40 cells an axis on
// average, so what could be shared between pairs (products of a query with every row of a table, or keys and
// values with a channel per cell) costs more than the pairs: 84 cells a query against about 34 pairs. A pair
// reads three rows of the tables, which lie together for Tq, Tk and Tv and stay in the first two cache
// levels.
#pragma once
#include "context.h"
#include "memory.h"
#include "scalar.h"
#include "simd.h"
#include "slots.h"

namespace vicinal::VICINAL_ISA {

// Runs of plan rows of about equal cost, times heads. Depends on the problem alone: sums have one order.
struct ContextTasks {
  static constexpr int32_t kRuns = 16;
  int64_t bounds[kRuns + 1];
  int32_t heads;

  explicit ContextTasks(const Context& a) : heads(a.heads) {
    const auto cost = [&](int64_t r) {
      return double(a.plan.rows[r].q_extent[2]) * (a.plan.rows[r].k_extent[2] + 1);
    };
    double total = 0, done = 0;
    for (int64_t r = 0; r < a.plan.n_rows; ++r) total += cost(r);
    int32_t run = 0;
    for (int64_t r = 0; r < a.plan.n_rows; ++r) {
      while (run < kRuns && done >= total * run / kRuns) bounds[run++] = r;
      done += cost(r);
    }
    while (run <= kRuns) bounds[run++] = a.plan.n_rows;
  }
  int64_t count() const { return int64_t(kRuns) * heads; }
};

// kV: vectors of a head of kContextWidth channels and values, or 0 for any.
template <class S, class T, int kV>
struct ContextBlock {
  static constexpr int kN = kLanes<T>;

  const Context& a;
  const int32_t vectors, vectors_v;
  const int64_t row_size;
  int32_t h = 0, nq = 0, nk = 0;
  const AxisEntry *queries = nullptr, *keys = nullptr;  // of the row at work
  const T* tables = nullptr;                            // of the head
  T *k, *v;                                             // [k_most][width], [k_most][width_v]
  T* q;                                                 // times scale [width]
  T *s, *term;                                          // per key: scores, key_bias
  int32_t* offset;  // of the table rows of cell 0 - those of a key, [key][axis]

  explicit ContextBlock(const Context& context)
      : a(context),
        vectors(kV ? kV : context.width / kN),
        vectors_v(kV ? kV : context.width_v / kN),
        row_size(context.row_size()) {}

  int64_t k_most() const { return round_up(a.plan.k_slots, kN); }
  void carve(cpu::Arena& arena) {
    k = arena.take<T>(k_most() * a.width), v = arena.take<T>(k_most() * a.width_v);
    q = arena.take<T>(a.width), s = arena.take<T>(k_most()), term = arena.take<T>(k_most());
    offset = arena.take<int32_t>(k_most() * kContextAxes);
  }

  static void pack(const S* from, int32_t d, T factor, T* to, int32_t width) {
    int32_t at = 0;
    for (; at + kN <= d; at += kN) store(to + at, load_as(from + at) * factor);
    if (at < d) store(to + at, load_part<T>(from + at, d - at) * factor), at += kN;
    for (; at < width; at += kN) store(to + at, Vec<T>{});
  }
  static void unpack(const T* from, T factor, S* to, int32_t d) {
    int32_t at = 0;
    for (; at + kN <= d; at += kN) store_as(to + at, load(from + at) * factor);
    if (at < d) store_part<T>(to + at, load(from + at) * factor, d - at);
  }

  void set_head(int32_t head) {
    h = head;
    tables = static_cast<const T*>(a.tables) + h * a.table_size();
  }
  void set_row(int64_t index) {
    const PlanRow& r = a.plan.rows[index];
    queries = a.plan.axes + r.q_begin[2], keys = a.plan.axes + r.k_begin[2];
    nq = r.q_extent[2], nk = r.k_extent[2];
    const T infinite = T(__builtin_inf());
    for (int32_t j = 0; j < nk; ++j) {
      const int64_t token = keys[j].token;
      term[j] = a.key_bias ? static_cast<const T*>(a.key_bias)[token] : T(0);
      const bool there = term[j] != -infinite;  // an excluded key may hold anything
      pack(row_of<S>(a.k, 0, token, h), there ? a.head_dim : 0, T(1), k + int64_t(j) * a.width, a.width);
      pack(row_of<S>(a.v, 0, token, h), there ? a.head_dim_v : 0, T(1), v + int64_t(j) * a.width_v,
           a.width_v);
      for (int32_t c = 0; c < kContextAxes; ++c)
        offset[j * kContextAxes + c] = static_cast<int32_t>(a.k_cells[token * kContextAxes + c] * row_size);
    }
    for (int32_t j = nk; j < round_up(nk, kN); ++j) {  // lanes beyond the keys read what the first key reads
      term[j] = -infinite;
      for (int32_t d = 0; d < a.width; d += kN) store(k + int64_t(j) * a.width + d, Vec<T>{});
      for (int32_t d = 0; d < a.width_v; d += kN) store(v + int64_t(j) * a.width_v + d, Vec<T>{});
      for (int32_t c = 0; c < kContextAxes; ++c) offset[j * kContextAxes + c] = offset[c];
    }
  }
  // Where the rows of the query's cells begin for a key of cell 0, relative to a head's tables.
  void locate(int64_t token, int64_t* at) const {
    for (int32_t c = 0; c < kContextAxes; ++c) {
      const int64_t row = c * int64_t(a.offsets) + (a.offsets - 1) / 2 + a.q_cells[token * kContextAxes + c];
      at[c] = row * row_size;
    }
  }

  // s = the scores of the query in q, in natural units.
  void scores(const int64_t* at) {
    for (int32_t j0 = 0; j0 < nk; j0 += kN) {
      Vec<T> r[kN];
      for (int32_t u = 0; u < kN; ++u) {
        const int32_t* o = offset + (j0 + u) * kContextAxes;
        const T *x = tables + at[0] - o[0], *y = tables + at[1] - o[1], *z = tables + at[2] - o[2];
        const T* key = k + int64_t(j0 + u) * a.width;
        Vec<T> sum = {};
#pragma GCC unroll 4
        for (int32_t c = 0; c < vectors; ++c) {
          const int32_t d = c * kN, e = d + a.width;
          const Vec<T> kd = load(key + d);
          sum += load(q + d) * (kd + load(x + d) + load(y + d) + load(z + d));
          sum += kd * (load(x + e) + load(y + e) + load(z + e));
        }
        r[u] = sum;
      }
      store(s + j0, sum_each<T>(r) + load(term + j0));
    }
  }
};

template <class S, class T>
inline bool context_is_narrow(const Context& a) {
  return a.width == kContextWidth && a.width_v == kContextWidth;
}

}  // namespace vicinal::VICINAL_ISA
