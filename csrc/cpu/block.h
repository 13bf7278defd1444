// What the forward and the backward pass share: keys and queries, packed or in place, and a block of scores.
//
// A block holds the scores of all keys of a row against up to kBlockQueries queries as S[key][query], so that
// the lanes of a vector are queries and the softmax needs no horizontal step. 1-3 queries that would fill a
// vector badly (49 = 3 * 16 + 1) are "tails": their scores come from dot products with lanes = head
// dimension.
#pragma once
#include "addresses.h"
#include "gemm.h"
#include "relative.h"
#include "slots.h"

namespace vicinal::VICINAL_ISA {

// kBlockQueries queries at a time: their scores against 256 keys fit the second-level cache.
constexpr int kBlockQueries = 64;

template <class T>
constexpr int kMostTails = kLanes<T> / 5;

template <class S, class T>
struct Block {
  static constexpr int kN = kLanes<T>;

  const Attend& a;
  const int32_t D, Dv, Dp, Dvp;  // the head dimensions, and rounded up to whole vectors
  const int32_t group;           // query heads per key head
  int64_t k_most, q_most;        // slots, rounded up to whole vectors
  T unit;                        // scores are kept in units of log 2 for the softmax
  Slots<T> slots[2];
  Slots<T>* now = &slots[0];   // the row at work
  Slots<T>* next = &slots[1];  // the row after it, whose tokens are prefetched
  const S* zeros;
  T *k, *v;                                // packed keys [k_most][Dp] (times k_scale), values [k_most][Dvp]
  const T *const *k_rows, *const *v_rows;  // or null: in place, instead of packed
  T* q;                                    // Q^T [D][kBlockQueries], times scale
  T* q_rows;  // the same queries as rows [kBlockQueries][Dp]; only the tails' unless all rows are wanted
  T* s;       // scores [k_most][kBlockQueries]
  T* mask;    // mask of a block, laid out like s
  T* column;  // k_most elements
  T* bias;    // expanded bias [group heads][k_most][q_most]
  int32_t *bias_q_code, *bias_k_code;  // what it was expanded for
  int32_t bias_nq, bias_nk, bias_box, bias_heads_begin, bias_heads_end;
  Addresses<S> addresses[2];
  Addresses<S>* here = &addresses[0];    // of `now` and the head at work
  Addresses<S>* there = &addresses[1];   // of what comes after it and is prefetched
  Rows read_too{};                       // dO
  Rows write_q{}, write_k{}, write_v{};  // what will be stored
  Relative<T> relative;
  bool k_in_place = false, v_in_place = false;
  int32_t ahead_at, ahead_end, ahead_step;
  const Ahead ahead{&Block::step_ahead, this};
  // The block at work.
  int32_t q0, n, vectors,
      tails;  // queries q0 .. q0 + n - 1 are `vectors` vectors and then `tails` single ones

  explicit Block(const Attend& attend)
      : a(attend),
        D(attend.head_dim),
        Dv(attend.head_dim_v),
        Dp(round_up(attend.head_dim, kN)),
        Dvp(round_up(attend.head_dim_v, kN)),
        group(attend.heads / attend.kv_heads),
        k_most(round_up(attend.plan.k_slots + attend.n_extra - attend.edge_row, kN)),
        q_most(round_up(attend.plan.q_slots, kN)),
        unit(attend.activation == kSoftmax ? T(kLog2E) : T(1)) {}

  int64_t bias_stride() const { return k_most * q_most; }  // elements per head

  void carve(cpu::Arena& arena, int32_t group_heads) {
    for (Slots<T>& x : slots) x.carve(arena, q_most, k_most);
    for (Addresses<S>& x : addresses) x.carve(arena, q_most, k_most, write_k.data != nullptr);
    const int32_t widest = D > Dv ? D : Dv;
    zeros = arena.take<S>(widest);
    k = arena.take<T>(k_most * Dp), v = arena.take<T>(k_most * Dvp);
    q = arena.take<T>(int64_t(D) * kBlockQueries), q_rows = arena.take<T>(int64_t(kBlockQueries) * Dp);
    s = arena.take<T>(k_most * kBlockQueries), column = arena.take<T>(k_most);
    mask = a.mask ? arena.take<T>(k_most * kBlockQueries) : nullptr;
    bias = a.bias ? arena.take<T>(bias_stride() * group_heads) : nullptr;
    bias_q_code = arena.take<int32_t>(q_most), bias_k_code = arena.take<int32_t>(k_most);
    bias_heads_begin = bias_heads_end = -1;
    relative.carve(arena, a, k_most, q_most, kBlockQueries, write_k.data != nullptr);
  }
  void clear_zeros() {  // after carve, when the memory is there
    const int32_t widest = D > Dv ? D : Dv;
    for (int32_t d = 0; d < widest; ++d) const_cast<S*>(zeros)[d] = S{};
  }

  // Makes `item` the row at work and the one after it, if it is before `end`, the next one.
  void advance(int64_t item, int64_t end) {
    Slots<T>* t = now;
    now = next, next = t;
    now->set(a, item / a.plan.n_rows, item % a.plan.n_rows);
    if (item + 1 < end) {
      next->set(a, (item + 1) / a.plan.n_rows, (item + 1) % a.plan.n_rows);
    } else {
      next->b = -1;
    }
  }

  // The expanded bias of heads h0 .. h1 - 1 for the slots of `now`, in units of the scores. False if it was
  // there.
  bool bias_is_current(int32_t h0, int32_t h1) const {
    return bias_heads_begin == h0 && bias_heads_end == h1 && bias_nq == now->nq && bias_nk == now->nk &&
           bias_box == now->box && !__builtin_memcmp(bias_q_code, now->q_code, sizeof(int32_t) * now->nq) &&
           !__builtin_memcmp(bias_k_code, now->k_code, sizeof(int32_t) * now->nk);
  }
  // In the table of a head; slots of the row that the bias was expanded for.
  int64_t bias_at(int32_t i, int32_t j) const {
    return j < bias_box ? bias_index(bias_q_code[i], bias_k_code[j]) : a.bias_size - (bias_nk - j);
  }
  [[gnu::noinline]] void expand_bias(int32_t h0, int32_t h1) {
    bias_heads_begin = h0, bias_heads_end = h1, bias_nq = now->nq, bias_nk = now->nk, bias_box = now->box;
    __builtin_memcpy(bias_q_code, now->q_code, sizeof(int32_t) * now->nq);
    __builtin_memcpy(bias_k_code, now->k_code, sizeof(int32_t) * now->nk);
    for (int32_t h = h0; h < h1; ++h) {
      const T* table = static_cast<const T*>(a.bias) + h * a.bias_size;
      for (int32_t j = 0; j < now->nk; ++j) {
        T* to = bias + (h - h0) * bias_stride() + j * q_most;
        for (int32_t i = 0; i < now->nq; ++i) to[i] = table[bias_at(i, j)] * unit;
        for (int32_t i = now->nq; i < q_most; ++i) to[i] = 0;
      }
    }
  }
  const T* bias_of(int32_t h) const { return bias ? bias + (h - bias_heads_begin) * bias_stride() : nullptr; }

  const S* key_row(const Slots<T>& x, const Rows& t, const Rows& extra, int32_t h, int32_t j) const {
    const int32_t source = x.k_source[j], kv = h / group;
    if (source >= 0) return row_of<S>(t, x.b, source, kv);
    return source == Slots<T>::kExcluded ? zeros : row_of<S>(extra, x.b, Slots<T>::kExtra - source, kv);
  }
  [[gnu::noinline]] void locate(const Slots<T>& x, int32_t h, Addresses<S>& to) const {
    to.b = x.b, to.row = x.row, to.h = h, to.nq = x.nq, to.nk = x.nk;
    locate_rows<S>(a.q, x.b, h, x.q_token, x.nq, to.q);
    if (to.dout) locate_rows<S>(read_too, x.b, h, x.q_token, x.nq, to.dout);
    locate_rows<S>(write_q, x.b, h, x.q_token, x.nq, to.to_q);
    for (int32_t i = 0; x.q_pads && i < x.nq; ++i) {
      if (x.q_token[i] >= 0) continue;
      to.q[i] = zeros, to.to_q[i] = nullptr;
      if (to.dout) to.dout[i] = zeros;
    }
    locate_rows<S>(a.k, x.b, h / group, x.k_source, x.nk, to.k);
    locate_rows<S>(a.v, x.b, h / group, x.k_source, x.nk, to.v);
    if (to.to_k) locate_rows<S>(write_k, x.b, h, x.k_token, x.nk, to.to_k);
    if (to.to_v) locate_rows<S>(write_v, x.b, h, x.k_token, x.nk, to.to_v);
    for (int32_t j = 0; x.k_special && j < x.nk; ++j) {
      to.k[j] = key_row(x, a.k, a.extra_k, h, j), to.v[j] = key_row(x, a.v, a.extra_v, h, j);
      if (to.to_k && x.k_token[j] < 0) to.to_k[j] = to.to_v[j] = nullptr;
    }
    for (int32_t j = x.nk; j < round_up(x.nk, kN); ++j) to.k[j] = to.v[j] = zeros;
  }
  // Before anything else of head h of `now`.
  void open(int32_t h) {
    if (there->b != now->b || there->row != now->row || there->h != h) locate(*now, h, *there);
    Addresses<S>* t = here;
    here = there, there = t;
  }
  // The row and head after head h of `now`, which `steps` calls of step_ahead prefetch.
  void look_ahead(int32_t h, int32_t h0, int32_t h1, int32_t steps) {
    const Slots<T>& x = h + 1 < h1 ? *now : *next;
    there->b = -1, there->nq = there->nk = 0;
    if (x.b >= 0) locate(x, h + 1 < h1 ? h + 1 : h0, *there);
    ahead_at = 0, ahead_end = 0;
    for (int32_t n : {here->nq, here->nk, there->nq, there->nk}) ahead_end = n > ahead_end ? n : ahead_end;
    ahead_step = (ahead_end + steps - 1) / steps;
  }
  static void step_ahead(void* context) {
    Block& w = *static_cast<Block*>(context);
    const Addresses<S>&x = *w.there, &y = *w.here;
    const int32_t D = w.D, Dv = w.Dv, rest = w.ahead_end - w.ahead_at;
    const int32_t end = w.ahead_at + (rest < w.ahead_step ? rest : w.ahead_step);
    for (int32_t i = w.ahead_at; i < end; ++i) {
      if (i < x.nk) prefetch_row<0>(x.k[i], D), prefetch_row<0>(x.v[i], Dv);
      if (i < x.nq) prefetch_row<0>(x.q[i], D);
      if (i < x.nq && x.dout) prefetch_row<0>(x.dout[i], Dv);
      if (i < y.nq) prefetch_row<1>(y.to_q[i], y.to_k ? D : Dv);
      if (i < y.nk && y.to_k) prefetch_row<1>(y.to_k[i], D), prefetch_row<1>(y.to_v[i], Dv);
    }
    w.ahead_at = end;
  }
  static void pack_row(const S* from, int32_t d, T factor, T* to) {
    int32_t at = 0;
    for (; at + kN <= d; at += kN) store(to + at, load_as(from + at) * factor);
    if (at < d) store(to + at, load_part<T>(from + at, d - at) * factor);
  }
  [[gnu::noinline]] void pack_keys(int32_t h) {
    k_rows = v_rows = nullptr;
    if constexpr (std::is_same_v<S, T>) {
      k_rows = k_in_place ? here->k : nullptr, v_rows = v_in_place ? here->v : nullptr;
    }
    const T* scales =
        a.k_scale ? static_cast<const T*>(a.k_scale) + now->b * a.n_k * a.scale_stride_n + h : nullptr;
    for (int32_t j = 0; !k_rows && j < now->nk; ++j) {
      const int32_t source = now->k_source[j];
      const T factor = scales && source >= 0 ? scales[source * a.scale_stride_n] : T(1);
      pack_row(here->k[j], D, factor, k + int64_t(j) * Dp);
    }
    for (int32_t j = 0; !v_rows && j < now->nk; ++j) pack_row(here->v[j], Dv, T(1), v + int64_t(j) * Dvp);
  }

  // Queries from `begin` on, a block of at most kBlockQueries.
  void set_block(int32_t begin, int32_t count) {
    q0 = begin, n = count;
    const int32_t rest = n % kN;
    tails = n > kN && rest <= kMostTails<T> ? rest : 0;
    vectors = (n - tails + kN - 1) / kN;
  }
  int32_t column_of_tail(int32_t t) const { return vectors * kN + t; }

  // The rows `source` [n][d] of the block -> columns [d][kBlockQueries], and rows [n][dp]: those of the
  // tails, or all of them. Row i is multiplied by factor_i = factor * (scales ? scales[token * stride] : 1),
  // its columns by column_factor too.
  [[gnu::noinline]] void pack_queries(const S* const* source, int32_t d, int32_t dp, T factor,
                                      const T* scales, T column_factor, T* columns, T* rows,
                                      bool all_rows) const {
    source += q0;
    for (int32_t i0 = 0; i0 < vectors * kN; i0 += kN) {
      const S* from[kN];
      T f[kN];
      for (int32_t u = 0; u < kN; ++u) {
        const int32_t i = i0 + u < n ? q0 + i0 + u : -1;
        from[u] = i < 0 ? zeros : source[i0 + u];
        f[u] = factor;
        if (scales && i >= 0 && now->q_token[i] >= 0) f[u] *= scales[now->q_token[i] * a.scale_stride_n];
      }
      for (int32_t d0 = 0; d0 < d; d0 += kN) {
        Vec<T> r[kN];
        const int32_t wide = d - d0 < kN ? d - d0 : kN;
#pragma GCC unroll 16
        for (int32_t u = 0; u < kN; ++u) {
          r[u] = (wide == kN ? load_as(from[u] + d0) : load_part<T>(from[u] + d0, wide)) * f[u];
          if (all_rows) store(rows + int64_t(i0 + u) * dp + d0, r[u]);
          r[u] *= column_factor;
        }
        transpose<T>(r);
#pragma GCC unroll 16
        for (int32_t u = 0; u < kN; ++u) {
          if (u < wide) store(columns + int64_t(d0 + u) * kBlockQueries + i0, r[u]);
        }
      }
    }
    for (int32_t u = 0; u < tails; ++u) {
      const int32_t i = q0 + column_of_tail(u), token = now->q_token[i];
      const T f = scales && token >= 0 ? factor * scales[token * a.scale_stride_n] : factor;
      pack_row(source[column_of_tail(u)], d, all_rows ? f : f * column_factor,
               rows + int64_t(column_of_tail(u)) * dp);
    }
  }
  const T* q_scales(int32_t h) const {
    return a.q_scale ? static_cast<const T*>(a.q_scale) + now->b * a.n_q * a.scale_stride_n + h : nullptr;
  }
  // out[j * kBlockQueries] = factor * (row j . x) for the keys j: a column of a block. Rows of d elements: in
  // place, or else packed in mat.
  [[gnu::noinline]] void dots(const T* const* rows, const T* mat, int32_t d, const T* x, T factor,
                              T* out) const {
    const int32_t dp = round_up(d, kN);
    for (int32_t j0 = 0; j0 < now->nk; j0 += kN) {
      Vec<T> r[kN];
#pragma GCC unroll 16
      for (int32_t u = 0; u < kN; ++u) {
        const T* row = rows ? rows[j0 + u] : mat + int64_t(j0 + u) * dp;
        r[u] = Vec<T>{};
        int32_t at = 0;
        for (; at + kN <= d; at += kN) r[u] += load(row + at) * load(x + at);
        if (at < d) r[u] += load_part<T>(row + at, d - at) * load(x + at);
      }
      const Vec<T> sums = sum_each<T>(r) * factor;
      for (int32_t u = 0; u < kN && j0 + u < now->nk; ++u) out[int64_t(j0 + u) * kBlockQueries] = sums[u];
    }
  }

  // S of the block, complete with every term: after pack_queries into q and q_rows.
  void scores(int32_t h, T tail_factor) {
    const T* init = bias ? bias_of(h) + q0 : nullptr;
    gemm_rows(Gemm<T>{k, Dp, q, kBlockQueries, init, q_most, s, kBlockQueries, &ahead, k_rows}, now->nk, D,
              vectors);
    for (int32_t u = 0; u < tails; ++u) {
      const int32_t c = column_of_tail(u);
      dots(k_rows, k, D, q_rows + int64_t(c) * Dp, tail_factor, s + c);
      for (int32_t j = 0; init && j < now->nk; ++j) s[int64_t(j) * kBlockQueries + c] += init[j * q_most + c];
    }
    if (now->regions || now->key_terms || a.mask) add_terms(h);
    if (a.rel) {
      const int64_t table = int64_t(kRelAxes) * a.rel_size;
      relative.set_row(a, *now);
      relative.expand(static_cast<const T*>(a.rel) + h * table, q0, n, unit);
      relative.add(s, now->nk, round_up(n, kN));
    }
  }
  // The terms that few rows have: per key, mask, region.
  [[gnu::noinline]] void add_terms(int32_t h) {
    const T across = a.activation == kSoftmax ? T(a.mask_value) * unit : -T(__builtin_inf());
    const int32_t wide = (vectors + (tails > 0)) * kN;
    if (mask) pack_mask(h, wide);
    T region[kBlockQueries];
    for (int32_t c = 0; c < wide; ++c) region[c] = c < n ? now->q_region[q0 + c] : T(0);
    for (int32_t j = 0; j < now->nk; ++j) {
      T* row = s + int64_t(j) * kBlockQueries;
      const bool in_box = j < now->box, masked = mask && in_box, crossing = now->regions && in_box;
      for (int32_t c = 0; c < wide; c += kN) {
        Vec<T> x = load(row + c) + now->k_term[j];
        if (masked) x += load(mask + int64_t(j) * kBlockQueries + c);
        if (crossing) x += load(region + c) != splat(now->k_region[j]) ? splat(across) : Vec<T>{};
        store(row + c, x);
      }
    }
  }
  void pack_mask(int32_t h, int32_t wide) {
    const int64_t w = (now->b * a.plan.n_rows + now->row) % a.mask_count;
    const T* from = static_cast<const T*>(a.mask) + w * a.mask_stride_w + h * a.mask_stride_h;
    for (int32_t j = 0; j < now->box; ++j) {
      T* to = mask + int64_t(j) * kBlockQueries;
      for (int32_t c = 0; c < wide; ++c)
        to[c] = c < n ? from[int64_t(q0 + c) * a.plan.k_slots + j] * unit : T(0);
    }
  }

  // Multiplies x (laid out like s) by keep / (1 - p).
  void drop(int32_t h, T* x) const {
    const uint32_t limit = dropout_threshold(a.dropout_p);
    const T kept = T(1 / (1 - a.dropout_p));
    const uint32_t bh = static_cast<uint32_t>(now->b * a.head_total + a.head_offset + h);
    const uint64_t seed = static_cast<uint64_t>(*a.seed);
    const int32_t together = a.drop_by_token ? 1 : 4;  // keys of one draw
    for (int32_t j = 0; j < now->nk; j += together) {
      int64_t first = j;
      if (a.drop_by_token) first = j < now->box ? now->k_token[j] : a.n_k + a.edge_row + j - now->box;
      if (first < 0) continue;  // a pad
      for (int32_t c = 0; c < n; ++c) {
        const Philox4 w = dropout_words(seed, static_cast<uint32_t>(first / 4), now->q_token[q0 + c], bh);
        for (int32_t u = 0; u < together && j + u < now->nk; ++u)
          x[int64_t(j + u) * kBlockQueries + c] *= w.x[first % 4 + u] >= limit ? kept : T(0);
      }
    }
  }
};

}  // namespace vicinal::VICINAL_ISA
