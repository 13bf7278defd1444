// attend where queries see parts of the key box, or where key boxes overlap, backward: a pass over queries
// (dq, dbias, dextra) and a pass over keys (dk, dv), which recomputes the weights.
//
// Weights are divided by their own sum (design.md, section 5). The pass over keys does not see all keys of a
// query, so the first pass leaves 1 / sum and delta of every query and head behind: 2 numbers where q has D.
//
// The passes do 3 and 4 products where one pass would do 5, 340 cycles a query of 7 x 7 windows and heads of
// 32 or 95 ns. Measured from the third-level cache on a busy machine: 494 ns. One pass that adds to the
// gradients of its keys would need buffers that overlap between tiles, and sums of them in a fixed order.
#include "attend_ranges.h"
#include "attend_ranges_sums.h"

namespace vicinal::VICINAL_ISA {
namespace {

template <class S, class T>
struct QueryPass : Ranges<S, T> {
  using Base = Ranges<S, T>;
  using Base::a, Base::D, Base::Dv, Base::Dp, Base::Dvp, Base::kN, Base::x, Base::softmax, Base::s, Base::ds,
      Base::stride, Base::now, Base::c0, Base::members, Base::terms, Base::extras;
  const AttendBwd& p;
  T* dq;                                        // [queries][Dp]
  T *lse, *dlse, *total, *delta;                // per query; total: of the weights, then its inverse
  T *bias_sum = nullptr, *extra_sum = nullptr;  // of this chunk and segment
  enum Sweep { kSums = 1, kGradients = 2 };

  explicit QueryPass(const AttendBwd& params) : Base(params.a, params.a.plan, false), p(params) {
    this->other_rows[0] = a.k, this->other_rows[1] = a.v;
    this->centre_rows[0] = a.q, this->centre_rows[1] = p.dout, this->results[0] = p.dq;
  }

  void carve(cpu::Arena& arena) {
    Base::carve(arena);
    const int64_t queries = a.plan.q_slots;
    dq = arena.take<T>(queries * Dp);
    lse = arena.take<T>(queries), dlse = arena.take<T>(queries);
    total = arena.take<T>(queries), delta = arena.take<T>(queries);
  }

  void row(int64_t item, int64_t end, int32_t h0, int32_t h1, const Left<T>& left) {
    this->set_row(item, end);
    const int32_t slabs = x.slabs(this->slab_rows);
    int32_t packed = -1;  // head of k and v
    for (int32_t h = h0; h < h1; ++h) {
      const int32_t kv = h / this->group;
      this->look_ahead(h, h0, h1);
      this->pack_queries(a.q, h, x.token, x.centres, D, Dp, T(a.scale), nullptr, this->centre);
      this->pack_queries(p.dout, h, x.token, x.centres, Dv, Dvp, T(1), nullptr, this->centre_v);
      this->clear(dq, int64_t(x.centres) * Dp);
      load_sums(h);
      if (packed != kv) this->pack_extras(kv);
      for (int sweep : {int(kSums), int(kGradients)}) {
        if (slabs == 1) sweep = kSums | kGradients;
        for (int32_t i = 0; i < slabs; ++i) {
          if (slabs > 1 || packed != kv) pack_slab(x.slab(i, slabs), kv);
          this->bands([&] { band(h, sweep); });
        }
        if (slabs == 1) break;
        for (int32_t c = 0; sweep == kSums && c < x.centres; ++c) finish_sums(c);
      }
      packed = kv;
      write(h, left);
    }
  }
  void pack_slab(const Slab& slab, int32_t kv) {
    this->slab = slab;
    const int32_t* tokens = x.other_token + slab.first;
    this->pack_keys(a.k, kv, tokens, slab.size, D, Dp, this->rows);
    this->pack_keys(a.v, kv, tokens, slab.size, Dv, Dvp, this->rows_v);
  }
  // lse in units of the scores; queries without a key get weights 0.
  void load_sums(int32_t h) {
    const T infinite = T(__builtin_inf());
    for (int32_t c = 0; c < x.centres; ++c) {
      lse[c] = infinite, dlse[c] = total[c] = delta[c] = 0;
      if (!softmax) continue;
      const int64_t at = (this->b * a.n_q + x.token[c]) * p.lse_stride_n + h;
      const T value = static_cast<const T*>(p.lse)[at];
      if (value == -infinite) continue;
      lse[c] = value * T(kToLog2);
      if (p.dlse) dlse[c] = static_cast<const T*>(p.dlse)[at];
    }
  }
  void finish_sums(int32_t c) {
    const T inverse = total[c] == 0 ? T(0) : 1 / total[c];
    delta[c] = softmax ? delta[c] * inverse - dlse[c] : T(0);
    total[c] = softmax ? inverse : T(1);
  }

  void band(int32_t h, int sweep) {
    this->step_ahead(h);
    for (int32_t u = 0; u < members; ++u) {
      T *line = s + u * stride, *grad = ds + u * stride;
      const int32_t c = c0 + u;
      this->scores(u, h);
      this->products(this->centre_v + int64_t(c) * Dvp, this->rows_v, this->extra_v, this->places_v(),
                     this->extra_at_v, Dvp, now[u], T(1), T(0), grad);
      if (a.dropout_p > 0) this->keep(u, h), this->drop(u, grad);
      weights(u, sweep);
      if (sweep == (kSums | kGradients)) finish_sums(c);
      if (!(sweep & kGradients)) continue;
      if (softmax) {
        for (int32_t i = 0; i < this->slots(now[u]); i += kN)
          store(grad + i, load(line + i) * total[c] * (load(grad + i) - delta[c]));
      }
      if (bias_sum) add_bias(u, h);
      if (extra_sum && this->first_slab()) add_extras(u, h);
    }
    if (!(sweep & kGradients)) return;
    T* out = dq + int64_t(c0) * Dp;
    this->weigh_windows(ds, this->rows, Dp, out);
    for (int32_t u = 0; extras && this->first_slab() && u < members; ++u)
      weigh(Dp / kN, ds + u * stride + this->window_slots(now[u]), this->extra_k, this->extra_at, extras,
            out + int64_t(u) * Dp);
  }
  // Scores become weights (before the division by their sum), the gradient of other activations is done.
  void weights(int32_t u, int sweep) {
    T *line = s + u * stride, *grad = ds + u * stride;
    const int32_t n = this->slots(now[u]), c = c0 + u;
    if (!softmax) {
      for (int32_t i = 0; i < n; i += kN) {
        const Vec<T> score = load(line + i);
        store(grad + i, slope<T>(a.activation, score) * load(grad + i));
        store(line + i, activate<T>(a.activation, score));
      }
      return;
    }
    Vec<T> sum = {}, product = {};
    for (int32_t i = 0; i < n; i += kN) {
      const Vec<T> w = exp2(load(line + i) - lse[c]);
      sum += w, product += w * load(grad + i);
      store(line + i, w);
    }
    if (sweep & kSums) total[c] += sum_across<T>(sum)[0], delta[c] += sum_across<T>(product)[0];
  }
  [[gnu::noinline]] void add_bias(int32_t u, int32_t h) {
    const Window& w = now[u];
    const T* from = ds + u * stride;
    T* table = bias_sum + h * this->table_stride();
    const int32_t code = x.code[c0 + u];
    for (int32_t line = 0; line < w.outer * w.lines; ++line, from += w.width) {
      const int32_t* codes = x.other_code + this->slab.first + x.line_row(w, line);
      if (x.code_step == 1) {
        T* to = table + bias_index(code, codes[0]);
        int32_t i = 0;
        for (; i + kN <= w.width; i += kN) store(to + i, load(to + i) + load(from + i));
        if (i < w.width) store(to + i, load(to + i) + load_part<T>(from + i, w.width - i));
      } else {
        for (int32_t i = 0; i < w.width; ++i) table[bias_index(code, codes[i])] += from[i];
      }
    }
    from = ds + u * stride + this->window_slots(w);
    for (int32_t e = 0; this->first_slab() && e < extras; ++e) table[a.bias_size - extras + e] += from[e];
  }
  [[gnu::noinline]] void add_extras(int32_t u, int32_t h) {
    const int32_t begin = this->window_slots(now[u]), c = c0 + u;
    const T *q = this->centre + int64_t(c) * Dp, *dout = this->centre_v + int64_t(c) * Dvp;
    for (int32_t e = 0; e < extras; ++e) {
      T w = s[u * stride + begin + e] * total[c];
      const T g = ds[u * stride + begin + e];
      if (a.dropout_p > 0) w *= terms[begin + e];
      T* sum = extra_sum + (int64_t(a.edge_row + e) * a.heads + h) * (D + Dv);
      for (int32_t d = 0; d < D; ++d) sum[d] += g * q[d];
      for (int32_t d = 0; d < Dv; ++d) sum[D + d] += w * dout[d];
    }
  }
  [[gnu::noinline]] void write(int32_t h, const Left<T>& left) {
    for (int32_t c = 0; c < x.centres; ++c) {
      const int32_t token = x.token[c];
      const int64_t at = (this->b * a.n_q + token) * a.heads + h;
      left.inverse[at] = total[c], left.delta[at] = delta[c];
      this->write_row(dq + int64_t(c) * Dp, T(a.scale), row_of<S>(p.dq, this->b, token, h), D);
    }
  }
  void chunk(const Range& r, const Left<T>& left) {
    bias_sum = left.bias ? left.bias + r.index * left.bias_stride : nullptr;
    for (int64_t i = r.h0 * left.table_stride; bias_sum && i < r.h1 * left.table_stride; ++i) bias_sum[i] = 0;
    for (int64_t item = r.begin; item < r.end; ++item) {
      if (left.extra && (item == r.begin || item % a.plan.n_rows == 0)) {
        extra_sum = left.extra + (r.index + item / a.plan.n_rows) * left.extra_stride;
        for (int32_t e = 0; e < a.n_extra; ++e) {
          T* head = extra_sum + int64_t(e) * a.heads * (D + Dv);
          for (int64_t i = r.h0 * (D + Dv); i < r.h1 * (D + Dv); ++i) head[i] = 0;
        }
      }
      row(item, r.end, r.h0, r.h1, left);
    }
  }
};

template <class S, class T>
struct KeyPass : Ranges<S, T> {
  using Base = Ranges<S, T>;
  using Base::a, Base::D, Base::Dv, Base::Dp, Base::Dvp, Base::kN, Base::x, Base::softmax, Base::s, Base::ds,
      Base::stride, Base::now, Base::c0, Base::members;
  const AttendBwd& p;
  T *dk, *dv;                            // [keys][Dp], [keys][Dvp]
  T *minus_lse, *minus_delta, *inverse;  // per query of the slab; delta times inverse
  T* line_terms;                         // a line of slots

  KeyPass(const AttendBwd& params, const Plan& plan) : Base(params.a, plan, true), p(params) {
    this->other_rows[0] = a.q, this->other_rows[1] = p.dout;
    this->centre_rows[0] = a.k, this->centre_rows[1] = a.v;
    this->results[0] = p.dk, this->results[1] = p.dv;
  }

  void carve(cpu::Arena& arena) {
    Base::carve(arena);
    dk = arena.take<T>(int64_t(this->plan.k_slots) * Dp),
    dv = arena.take<T>(int64_t(this->plan.k_slots) * Dvp);
    const int64_t queries = this->capacity + kN;
    minus_lse = arena.take<T>(queries), minus_delta = arena.take<T>(queries);
    inverse = arena.take<T>(queries), line_terms = arena.take<T>(stride);
  }

  void row(int64_t item, int64_t end, int32_t kv0, int32_t kv1, const Left<T>& left) {
    this->set_row(item, end);
    const int32_t slabs = x.slabs(this->slab_rows);
    for (int32_t kv = kv0; kv < kv1; ++kv) {
      this->pack_keys(a.k, kv, x.token, x.centres, D, Dp, this->centre);
      this->pack_keys(a.v, kv, x.token, x.centres, Dv, Dvp, this->centre_v);
      this->clear(dk, int64_t(x.centres) * Dp), this->clear(dv, int64_t(x.centres) * Dvp);
      for (int32_t h = kv * this->group; h < (kv + 1) * this->group; ++h) {
        this->look_ahead(h, kv0 * this->group, kv1 * this->group);
        for (int32_t i = 0; i < slabs; ++i) {
          pack_slab(x.slab(i, slabs), h, left);
          this->bands([&] { band(h); });
        }
      }
      for (int32_t c = 0; c < x.centres; ++c) {
        this->write_row(dk + int64_t(c) * Dp, T(1), row_of<S>(p.dk, this->b, x.token[c], kv), D);
        this->write_row(dv + int64_t(c) * Dvp, T(1), row_of<S>(p.dv, this->b, x.token[c], kv), Dv);
      }
    }
  }
  void pack_slab(const Slab& slab, int32_t h, const Left<T>& left) {
    this->slab = slab;
    const int32_t* tokens = x.other_token + slab.first;
    const T infinite = T(__builtin_inf());
    for (int32_t j = 0; j < slab.size; ++j) {
      const int64_t token = this->b * a.n_q + tokens[j];
      inverse[j] = left.inverse[token * a.heads + h];
      minus_delta[j] = -left.delta[token * a.heads + h] * inverse[j];
      const T lse = softmax ? static_cast<const T*>(p.lse)[token * p.lse_stride_n + h] : T(0);
      minus_lse[j] = lse == -infinite ? -infinite : -lse * T(kToLog2);
    }
    this->pack_queries(a.q, h, tokens, slab.size, D, Dp, T(a.scale), nullptr, this->rows);
    this->pack_queries(p.dout, h, tokens, slab.size, Dv, Dvp, T(1), inverse, this->rows_v);
  }

  void band(int32_t h) {
    this->step_ahead(h);
    for (int32_t u = 0; u < members; ++u) {
      T *line = s + u * stride, *grad = ds + u * stride;
      const int32_t c = c0 + u;
      this->scores(u, h);
      this->products(this->centre_v + int64_t(c) * Dvp, this->rows_v, nullptr, this->places_v(), nullptr, Dvp,
                     now[u], T(1), T(0), grad);
      const bool dropped = a.dropout_p > 0;
      if (dropped) this->keep(u, h), this->drop(u, grad);
      softmax ? gradients(u) : slopes(u);
      if (dropped) this->drop(u, line);
    }
    this->weigh_windows(ds, this->rows, Dp, dk + int64_t(c0) * Dp);
    this->weigh_windows(s, this->rows_v, Dvp, dv + int64_t(c0) * Dvp);
  }
  void gradients(int32_t u) {
    T *line = s + u * stride, *grad = ds + u * stride;
    const int32_t n = this->slots(now[u]);
    const T term =
        a.key_bias ? static_cast<const T*>(a.key_bias)[this->b * a.n_k + x.token[c0 + u]] * this->unit : T(0);
    gather_lines(x, now[u], minus_lse, line_terms);
    store(line_terms + now[u].count(), Vec<T>{});
    for (int32_t i = 0; i < n; i += kN) store(line + i, exp2(load(line + i) + load(line_terms + i) + term));
    gather_lines(x, now[u], minus_delta, line_terms);
    store(line_terms + now[u].count(), Vec<T>{});
    for (int32_t i = 0; i < n; i += kN)
      store(grad + i, load(line + i) * (load(grad + i) + load(line_terms + i)));
  }
  void slopes(int32_t u) {
    T *line = s + u * stride, *grad = ds + u * stride;
    for (int32_t i = 0; i < this->slots(now[u]); i += kN) {
      const Vec<T> score = load(line + i);
      store(grad + i, slope<T>(a.activation, score) * load(grad + i));
      store(line + i, activate<T>(a.activation, score));
    }
  }
};

template <class S, class T>
void run(const AttendBwd& p, int threads) {
  if (p.a.heads == 0) return;
  const Plan& by_keys = p.key_plan.n_rows ? p.key_plan : p.a.plan;
  Attend keys = p.a;  // as the schedule of the pass over keys sees it
  keys.plan = by_keys, keys.heads = p.a.kv_heads;
  QueryPass<S, T> counted(p);
  KeyPass<S, T> counted_keys(p, by_keys);
  const double dims = p.a.head_dim + p.a.head_dim_v;
  const Schedule plan = make_schedule(p.a, 1, 3.0 * p.a.plan.q_slots * p.a.plan.k_slots * dims);
  const Schedule key_schedule = make_schedule(keys, 1, 4.0 * by_keys.q_slots * by_keys.k_slots * dims);
  cpu::Arena counter(nullptr), key_counter(nullptr);
  counted.carve(counter), counted_keys.carve(key_counter);
  const size_t bytes = counter.used() > key_counter.used() ? counter.used() : key_counter.used();
  const int64_t chunks = plan.chunks(), key_chunks = key_schedule.chunks(),
                most = chunks > key_chunks ? chunks : key_chunks;
  [[maybe_unused]] const int team = static_cast<int>(at_least(threads < most ? threads : most, 1));
  const Left<T> left(p, plan, counted.table_stride());
#pragma omp parallel num_threads(team) if (team > 1)
  {
    void* memory = cpu::thread_scratch(bytes);
    {
      QueryPass<S, T> w(p);
      cpu::Arena arena(memory);
      w.carve(arena);
      w.start();
#pragma omp for schedule(dynamic)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) w.chunk(plan.range(p.a, chunk), left);
    }
    add_up(p, plan, left);
    KeyPass<S, T> w(p, by_keys);
    cpu::Arena arena(memory);
    w.carve(arena);
    w.start();
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < key_chunks; ++chunk) {
      const Range r = key_schedule.range(keys, chunk);
      for (int64_t item = r.begin; item < r.end; ++item) w.row(item, r.end, r.h0, r.h1, left);
    }
  }
}

}  // namespace

void attend_ranges_bwd(const AttendBwd& p, int threads) {
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
