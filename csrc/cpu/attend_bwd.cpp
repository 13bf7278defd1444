// attend, backward: per row and head, blocks of queries against all keys (block.h).
//
// The weights are recomputed from lse, and delta = sum of P * dP (so `out` is not read). A plan row owns the
// gradients of its tokens; sums over rows (dbias, dextra) go through one partial per run of items, added in
// the order of the runs.
//
// Floor of 8 x 56 x 56 tokens, 3 heads of 32, windows of 7 x 7, float32: 1180 MFLOP, 4.6 ms on one Zen 5
// core. Packing and writing rows cost 30% of 11.5 ms; in place and from the tiles 9.7 ms (1.18 times as fast,
// one thread, interleaved). With several blocks of queries it gains nothing and everything is packed.
// bfloat16 in pairs: 1.4 times as fast as in float (16 x 16 windows 1.26). A chunk of a single item, with 24
// heads whose bias it expands and sums, had cost a third of the time of 32 windows of 7 x 7: hence Schedule's
// least_items.
#include <cstdlib>

#include "block.h"
#include "pairs_bwd.h"
#include "schedule.h"
#include "weights.h"

namespace vicinal::VICINAL_ISA {

void attend_ranges_bwd(const AttendBwd& p, int threads);

namespace {

// What the chunks leave behind for the sums. Segments: index of the run of items + batch, which is unique.
template <class T>
struct Partials {
  T* bias = nullptr;   // [runs][heads][bias_size]
  T* extra = nullptr;  // [segments][n_extra][heads][D + Dv]
  T* rel = nullptr;    // [runs][heads][kRelAxes][rel_size]
  int64_t bias_stride = 0, extra_stride = 0, rel_stride = 0;

  void allocate(const AttendBwd& p, const Schedule& plan) {
    const Attend& a = p.a;
    bias_stride = int64_t(a.heads) * a.bias_size;
    extra_stride = int64_t(a.n_extra) * a.heads * (a.head_dim + a.head_dim_v);
    if (p.dbias) bias = take(plan.item_chunks * bias_stride);
    rel_stride = int64_t(a.heads) * kRelAxes * a.rel_size;
    if (p.drel) rel = take(plan.item_chunks * rel_stride);
    if (a.n_extra && (p.dextra_k.data || p.dextra_v.data))
      extra = take((plan.item_chunks + a.batch) * extra_stride);
  }
  static T* take(int64_t n) {
    T* data = static_cast<T*>(std::malloc(static_cast<size_t>(n + 1) * sizeof(T)));
    if (!data) std::abort();
    return data;
  }
  void release() { std::free(bias), std::free(extra), std::free(rel); }
};

template <class S, class T>
struct Backward : Block<S, T> {
  using Base = Block<S, T>;
  using Base::a, Base::D, Base::Dv, Base::Dp, Base::Dvp, Base::kN, Base::now, Base::n, Base::q0, Base::s,
      Base::column, Base::here, Base::k, Base::v, Base::q, Base::q_rows, Base::vectors;
  static constexpr bool kSame = std::is_same_v<S, T>;

  const AttendBwd& p;
  const bool softmax, pairs;
  bool q_in_place, dout_in_place;
  T* ds_rows;                            // of pairs_bwd.h
  T q_factor[kBlockQueries], *k_factor;  // what rows of dq and dk are multiplied by
  T *dout, *dout_rows;                   // dO^T [Dv][kBlockQueries] and rows [kBlockQueries][Dvp]
  T* ds;                                 // dP, then dS, laid out like s
  T* column2;                            // k_most elements
  T *dq, *dk, *dv;                       // [kBlockQueries][Dp], [k_most][Dp], [k_most][Dvp]
  T* dbias;                              // laid out like bias
  T* extra = nullptr;                    // this segment's
  T* drel = nullptr;                     // this run's, [heads][kRelAxes][rel_size]
  // factor: what makes the weights of a query add up to 1. Packed rows of dO take it, else the weights do.
  T lse[kBlockQueries], dlse[kBlockQueries], factor[kBlockQueries];

  explicit Backward(const AttendBwd& params)
      : Base(params.a), p(params), softmax(a.activation == kSoftmax), pairs(can_pair<S>(a) && Dv % 2 == 0) {
    this->read_too = p.dout;
    this->write_q = p.dq, this->write_k = p.dk, this->write_v = p.dv;
    const bool one_block =
        kSame && a.plan.q_slots <= kBlockQueries;  // several would read rows again and again
    this->k_in_place = one_block && !a.k_scale && D % kN == 0, this->v_in_place = one_block;
    q_in_place = pairs || (one_block && !a.q_scale && D % kN == 0);
    dout_in_place = one_block && Dv % kN == 0;
  }
  void carve(cpu::Arena& arena, int32_t group_heads) {
    Base::carve(arena, group_heads);
    dout = arena.take<T>(int64_t(Dv) * kBlockQueries),
    dout_rows = arena.take<T>(int64_t(kBlockQueries) * Dvp);
    ds = arena.take<T>(this->k_most * kBlockQueries), column2 = arena.take<T>(this->k_most);
    dq = arena.take<T>(int64_t(kBlockQueries) * Dp);
    dk = arena.take<T>(this->k_most * Dp), dv = arena.take<T>(this->k_most * Dvp);
    k_factor = arena.take<T>(this->k_most);
    ds_rows = pairs ? arena.take<T>(this->k_most * kBlockQueries / 2) : nullptr;
    dbias = p.dbias ? arena.take<T>(this->bias_stride() * group_heads) : nullptr;
  }

  void row(int32_t h0, int32_t h1, T* bias_partial) {
    if (this->bias && !this->bias_is_current(h0, h1)) {
      if (dbias) flush_bias(h0, h1, bias_partial);
      this->expand_bias(h0, h1);
    }
    const int32_t blocks = (now->nq + kBlockQueries - 1) / kBlockQueries;
    const int32_t size = round_up((now->nq + blocks - 1) / blocks, kN);
    for (int32_t h = h0; h < h1; ++h) {
      this->open(h);
      if (!pairs) this->pack_keys(h);
      if constexpr (kHasPairs<S>) {
        if (pairs) interleave_rows(here->k, now->nk, D, Dp, k);
      }
      find_key_factors(h);
      this->look_ahead(h, h0, h1, blocks * (4 * ((now->nk + 7) / 8) + (size + 11) / 12));
      bool keys_done = false;
      for (int32_t begin = 0; begin < now->nq; begin += size) {
        this->set_block(begin, now->nq - begin < size ? now->nq - begin : size);
        keys_done = block(h);
      }
      if (!keys_done) write_keys(h);
    }
  }

  // True if the gradients of the keys are where they belong: a single block of one dtype writes them at once.
  bool block(int32_t h) {
    if constexpr (kHasPairs<S>) {
      if (pairs) return pair_block(*this, h);
    }
    this->pack_queries(here->q, D, Dp, T(a.scale), this->q_scales(h), this->unit, q, q_rows, !q_in_place);
    this->scores(h, q_in_place ? T(1) : this->unit);
    this->pack_queries(here->dout, Dv, Dvp, T(1), nullptr, T(1), dout, dout_rows, !dout_in_place);
    const Ahead* ahead = &this->ahead;
    gemm_rows(Gemm<T>{v, Dvp, dout, kBlockQueries, nullptr, 0, ds, kBlockQueries, ahead, this->v_rows},
              now->nk, Dv, vectors);
    for (int32_t u = 0; u < this->tails; ++u) {
      const int32_t c = this->column_of_tail(u);
      this->dots(this->v_rows, v, Dv, dout_rows + int64_t(c) * Dvp, T(1), ds + c);
    }
    if (a.dropout_p > 0) this->drop(h, ds);
    load_sums(h);
    T* bias_sum = dbias ? dbias + (h - this->bias_heads_begin) * this->bias_stride() + q0 : nullptr;
    for (int32_t c = 0; c < vectors * kN; c += kN) gradients(c, bias_sum);
    for (int32_t u = 0; u < this->tails; ++u) tail_gradients(this->column_of_tail(u), bias_sum);
    if (drel) this->relative.gradient(ds, now->nk, q0, n, drel + int64_t(h) * kRelAxes * a.rel_size);
    if (a.dropout_p > 0) this->drop(h, s);
    return products(h);
  }
  // dq, dk and dv from s and ds.
  bool products(int32_t h) {
    find_query_factors(h);
    const Ahead* ahead = &this->ahead;
    Gemm<T> to_q{ds, kBlockQueries, k, Dp, nullptr, 0, dq, Dp, ahead, nullptr, this->k_rows};
    Gemm<T> to_k{ds, kBlockQueries, q_rows, Dp, q0 ? dk : nullptr, Dp, dk, Dp, ahead};
    Gemm<T> to_v{s, kBlockQueries, dout_rows, Dvp, q0 ? dv : nullptr, Dvp, dv, Dvp, ahead};
    bool q_done = false, k_done = false;
    if constexpr (kSame) {
      if (q_in_place) to_k.b_rows = here->q + q0;
      if (dout_in_place) to_v.b_rows = here->dout + q0;
      q_done = D % kN == 0 && !now->q_pads;
      if (q_done) to_q.c_rows = here->to_q + q0, to_q.c_factor = q_factor;
      k_done = D % kN == 0 && Dv % kN == 0 && !now->k_special && n == now->nq;
      if (k_done) to_k.c_rows = here->to_k, to_k.c_factor = k_factor, to_v.c_rows = here->to_v;
    }
    gemm_columns(to_q, n, now->nk, Dp / kN);
    if (!q_done) write_queries();
    gemm_rows(to_k, now->nk, n, Dp / kN);
    for (int32_t c = 0; softmax && !dout_in_place && c < n; ++c)
      scale_row(dout_rows + int64_t(c) * Dvp, factor[c]);
    gemm_rows(to_v, now->nk, n, Dvp / kN);
    return k_done;
  }
  void find_query_factors(int32_t h) {
    const T* scales = this->q_scales(h);
    for (int32_t c = 0; c < n; ++c) {
      const int32_t token = now->q_token[q0 + c];
      q_factor[c] = T(a.scale) * (scales && token >= 0 ? scales[token * a.scale_stride_n] : T(1));
    }
  }
  // The rows that dk is made of have the scale in them when they are packed.
  void find_key_factors(int32_t h) {
    const T* scales =
        a.k_scale ? static_cast<const T*>(a.k_scale) + now->b * a.n_k * a.scale_stride_n + h : nullptr;
    for (int32_t j = 0; j < now->nk; ++j) {
      const int32_t token = now->k_token[j];
      k_factor[j] =
          (q_in_place ? T(a.scale) : T(1)) * (scales && token >= 0 ? scales[token * a.scale_stride_n] : T(1));
    }
  }

  // lse (in units of the scores) and dlse of the block; queries without a key, and pads, get weights 0.
  void load_sums(int32_t h) {
    const T infinite = T(__builtin_inf());
    for (int32_t c = 0; c < kBlockQueries; ++c) lse[c] = infinite, dlse[c] = 0;
    for (int32_t c = 0; softmax && c < n; ++c) {
      const int32_t token = now->q_token[q0 + c];
      if (token < 0) continue;
      const int64_t at = (now->b * a.n_q + token) * p.lse_stride_n + h;
      const T x = static_cast<const T*>(p.lse)[at];
      lse[c] = x == -infinite ? infinite : x * T(kLog2E);
      if (p.dlse && x != -infinite) dlse[c] = static_cast<const T*>(p.dlse)[at];
    }
  }

  // A vector of queries: s becomes the weights, ds the gradient of the scores, which is added to bias_sum.
  [[gnu::noinline]] void gradients(int32_t c, T* bias_sum) {
    const int32_t nk = now->nk, stride = this->q_most;
    if (softmax) {
      const Vec<T> l = load(lse + c);
      Vec<T> total = {}, delta = {};
      for (int32_t j = 0; j < nk; ++j) {
        T* x = s + int64_t(j) * kBlockQueries + c;
        const Vec<T> w = exp2(load(x) - l);
        total += w;
        delta += w * load(ds + int64_t(j) * kBlockQueries + c);
        store(x, w);
      }
      // Weights that add up to 1 whatever the rounding of lse, which large scores make coarse.
      const Vec<T> inverse = total == Vec<T>{} ? Vec<T>{} : T(1) / total;
      delta = delta * inverse - load(dlse + c);
      store(factor + c, inverse);
      for (int32_t j = 0; j < nk; ++j) {
        T *x = s + int64_t(j) * kBlockQueries + c, *y = ds + int64_t(j) * kBlockQueries + c;
        const Vec<T> w = load(x) * inverse, g = w * (load(y) - delta);
        if (dout_in_place) store(x, w);
        store(y, g);
        if (bias_sum) store(bias_sum + int64_t(j) * stride + c, load(bias_sum + int64_t(j) * stride + c) + g);
      }
      return;
    }
    for (int32_t j = 0; j < nk; ++j) {
      T *x = s + int64_t(j) * kBlockQueries + c, *y = ds + int64_t(j) * kBlockQueries + c;
      const Vec<T> score = load(x), g = slope<T>(a.activation, score) * load(y);
      store(x, activate<T>(a.activation, score)), store(y, g);
      if (bias_sum) store(bias_sum + int64_t(j) * stride + c, load(bias_sum + int64_t(j) * stride + c) + g);
    }
  }
  // The same for one query: its keys become the lanes.
  [[gnu::noinline]] void tail_gradients(int32_t c, T* bias_sum) {
    const int32_t nk = now->nk, padded = round_up(nk, kN);
    for (int32_t j = 0; j < nk; ++j) {
      column[j] = s[int64_t(j) * kBlockQueries + c], column2[j] = ds[int64_t(j) * kBlockQueries + c];
    }
    for (int32_t j = nk; j < padded; ++j) column[j] = -T(__builtin_inf()), column2[j] = 0;
    Vec<T> sum = {}, total = {};
    for (int32_t j = 0; j < padded; j += kN) {
      const Vec<T> x = load(column + j);
      const Vec<T> w = softmax ? exp2(x - lse[c]) : activate<T>(a.activation, x);
      if (!softmax) store(column2 + j, slope<T>(a.activation, x) * load(column2 + j));
      sum += w * load(column2 + j), total += w;
      store(column + j, w);
    }
    const T all = sum_lanes<T>(total), inverse = all == 0 ? T(0) : 1 / all;
    const T delta = sum_lanes<T>(sum) * inverse - dlse[c];
    factor[c] = inverse;
    for (int32_t j = 0; softmax && j < padded; j += kN) {
      const Vec<T> w = load(column + j) * inverse;
      if (dout_in_place) store(column + j, w);
      store(column2 + j, w * (load(column2 + j) - delta));
    }
    for (int32_t j = 0; j < nk; ++j) {
      s[int64_t(j) * kBlockQueries + c] = column[j], ds[int64_t(j) * kBlockQueries + c] = column2[j];
      if (bias_sum) bias_sum[int64_t(j) * this->q_most + c] += column2[j];
    }
  }

  void scale_row(T* x, T by) const {
    for (int32_t d = 0; d < Dvp; d += kN) store(x + d, load(x + d) * by);
  }
  static void write_row(const T* from, T factor, S* to, int32_t d) {
    int32_t at = 0;
    for (; at + kN <= d; at += kN) store_as(to + at, load(from + at) * factor);
    if (at < d) store_part<T>(to + at, load(from + at) * factor, d - at);
  }
  [[gnu::noinline]] void write_queries() {
    for (int32_t c = 0; c < n; ++c) {
      S* to = here->to_q[q0 + c];
      if (to) write_row(dq + int64_t(c) * Dp, q_factor[c], to, D);
    }
  }
  [[gnu::noinline]] void write_keys(int32_t h) {
    for (int32_t j = 0; j < now->nk; ++j) {
      const int32_t source = now->k_source[j];
      if (now->k_token[j] >= 0) {
        write_row(dk + int64_t(j) * Dp, k_factor[j], here->to_k[j], D);
        write_row(dv + int64_t(j) * Dvp, T(1), here->to_v[j], Dv);
      } else if (extra && source <= Slots<T>::kExtra) {
        T* sum = extra + (int64_t(Slots<T>::kExtra - source) * a.heads + h) * (D + Dv);
        for (int32_t d = 0; d < D; ++d) sum[d] += dk[int64_t(j) * Dp + d] * k_factor[j];
        for (int32_t d = 0; d < Dv; ++d) sum[D + d] += dv[int64_t(j) * Dvp + d];
      }
    }
  }

  void clear_bias() {
    for (int64_t i = 0; i < this->bias_stride() * (this->bias_heads_end - this->bias_heads_begin); ++i)
      dbias[i] = 0;
  }
  // Adds the dense sums of heads h0 .. h1 - 1 to the table and clears them.
  void flush_bias(int32_t h0, int32_t h1, T* table) {
    if (this->bias_heads_begin != h0 || this->bias_heads_end != h1) return;  // nothing is there yet
    for (int32_t h = h0; h < h1; ++h) {
      for (int32_t j = 0; j < this->bias_nk; ++j) {
        const T* from = dbias + (h - h0) * this->bias_stride() + int64_t(j) * this->q_most;
        for (int32_t i = 0; i < this->bias_nq; ++i) table[h * a.bias_size + this->bias_at(i, j)] += from[i];
      }
    }
    clear_bias();
  }
  void start_segment(T* partial, int32_t h0, int32_t h1) {
    extra = partial;
    for (int32_t e = 0; e < a.n_extra; ++e) {
      for (int64_t i = (int64_t(e) * a.heads + h0) * (D + Dv); i < (int64_t(e) * a.heads + h1) * (D + Dv);
           ++i)
        extra[i] = 0;
    }
  }
  void chunk(const Range& r, const Partials<T>& partials) {
    T* table = dbias ? partials.bias + r.index * partials.bias_stride : nullptr;
    for (int64_t i = r.h0 * a.bias_size; dbias && i < r.h1 * a.bias_size; ++i) table[i] = 0;
    if (dbias)
      this->bias_heads_begin = r.h0, this->bias_heads_end = r.h1, clear_bias(), this->bias_heads_begin = -1;
    drel = partials.rel ? partials.rel + r.index * partials.rel_stride : nullptr;
    const int64_t each = int64_t(kRelAxes) * a.rel_size;
    for (int64_t i = r.h0 * each; drel && i < r.h1 * each; ++i) drel[i] = 0;
    for (int64_t item = r.begin; item < r.end; ++item) {
      this->advance(item, r.end);
      if (partials.extra && (item == r.begin || now->row == 0)) {
        start_segment(partials.extra + (r.index + now->b) * partials.extra_stride, r.h0, r.h1);
      }
      row(r.h0, r.h1, table);
    }
    if (dbias) flush_bias(r.h0, r.h1, table);
  }
};

// dbias and dextra from the partials; the order of each sum is the order of the runs.
template <class T>
void add_partials(const AttendBwd& p, const Schedule& plan, const Partials<T>& partials) {
  const Attend& a = p.a;
  const int32_t D = a.head_dim, Dv = a.head_dim_v;
#pragma omp for schedule(static)
  for (int32_t h = 0; h < a.heads; ++h) {
    T* to = partials.bias ? static_cast<T*>(p.dbias) + h * a.bias_size : nullptr;
    for (int64_t t = 0; to && t < a.bias_size; ++t) to[t] = 0;
    for (int64_t c = 0; to && c < plan.item_chunks; ++c) {
      const T* from = partials.bias + c * partials.bias_stride + h * a.bias_size;
      for (int64_t t = 0; t < a.bias_size; ++t) to[t] += from[t];
    }
    const int64_t each = int64_t(kRelAxes) * a.rel_size;
    T* rel = partials.rel ? static_cast<T*>(p.drel) + h * each : nullptr;
    for (int64_t t = 0; rel && t < each; ++t) rel[t] = 0;
    for (int64_t c = 0; rel && c < plan.item_chunks; ++c) {
      const T* from = partials.rel + c * partials.rel_stride + h * each;
      for (int64_t t = 0; t < each; ++t) rel[t] += from[t];
    }
    for (int64_t b = 0; partials.extra && b < a.batch; ++b) {
      const int64_t first = b * a.plan.n_rows / plan.chunk_items;
      const int64_t last = ((b + 1) * a.plan.n_rows - 1) / plan.chunk_items;
      for (int32_t e = 0; e < a.n_extra; ++e) {
        T* dk = p.dextra_k.data ? row_of<T>(p.dextra_k, b, e, h) : nullptr;
        T* dv = p.dextra_v.data ? row_of<T>(p.dextra_v, b, e, h) : nullptr;
        for (int64_t c = first; c <= last; ++c) {
          const T* from =
              partials.extra + (c + b) * partials.extra_stride + (int64_t(e) * a.heads + h) * (D + Dv);
          for (int32_t d = 0; dk && d < D; ++d) dk[d] = c == first ? from[d] : dk[d] + from[d];
          for (int32_t d = 0; dv && d < Dv; ++d) dv[d] = c == first ? from[D + d] : dv[d] + from[D + d];
        }
      }
    }
  }
}

template <class S, class T>
void run(const AttendBwd& p, int threads) {
  if (p.a.heads == 0) return;
  Backward<S, T> counted(p);
  const double flops = 5.0 * p.a.plan.q_slots * counted.k_most * (p.a.head_dim + p.a.head_dim_v);
  const Schedule plan = make_schedule(p.a, 2 * counted.bias_stride() * sizeof(T), flops);
  cpu::Arena counter(nullptr);
  counted.carve(counter, plan.group_heads);
  const int64_t chunks = plan.chunks();
  const int team = static_cast<int>(at_least(threads < chunks ? threads : chunks, 1));
  Partials<T> partials;
  partials.allocate(p, plan);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    Backward<S, T> w(p);
    cpu::Arena arena(cpu::thread_scratch(counter.used()));
    w.carve(arena, plan.group_heads);
    w.clear_zeros();
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) w.chunk(plan.range(p.a, chunk), partials);
    add_partials(p, plan, partials);
  }
  partials.release();
}

}  // namespace

void attend_bwd(const AttendBwd& p, int threads) {
  if (p.key_plan.n_rows || p.a.plan.guard) return attend_ranges_bwd(p, threads);
  switch (p.a.dtype) {
    case kF32:
      return run<float, float>(p, threads);
    case kF64:
      return run<double, double>(p, threads);
    case kBF16:
      return run<BFloat16, float>(p, threads);
    case kF16:
      return run<Half, float>(p, threads);
  }
}

}  // namespace vicinal::VICINAL_ISA
