// attend where queries see parts of the key box, forward.
//
// Floor of a query of 56 x 56, windows of 7 x 7, heads of 32: 196 vector multiply-adds, 98 cycles, 27 ns on
// one Zen 5 core. Predicted: scores 28 ns (dots.h), weighted values 17 (each row loaded once for 4 queries),
// softmax of 4 vectors 15, packing 2.1 keys 6, the rest 5: 71 ns, 38% of the FMA rate. Measured on a busy
// machine: 95 ns where the tensors lie in the second-level cache, 142-164 ns from the third, 17%; heads of 64
// 28%, 13 x 13 windows on 112 x 112 31%, 127 keys of 4096 33%. Packing waits for the third level although
// the next head or row is prefetched (without: 205 instead of 177 ns).
//
// Tiles: 4 x 4 queries pack 12.5 rows a query and take 2.3 times as long as 28 x 8. Tiles of 8 x 28 pack as
// few but the lines of a window leave the first-level cache before the next row of queries (13 x 13: 441
// instead of 297 ns). Lanes = queries would do 100 products where 49 count.
//
// On a Zen 3 core (AVX2; one thread, interleaved) a query has a floor of 196 cycles, 73 ns. 280 ns became 220
// (31% of the FMA rate; heads of 64 32%): weighted values two vectors at a time, since four spilled; blends
// instead of shuffles in dots.h; the softmax of a band's members in step; rows asked for 16 before their turn
// in packing. Without the prefetches of the next head it is 10% slower.
#include "attend_ranges.h"

namespace vicinal::VICINAL_ISA {
namespace {

template <class S, class T>
struct Forward : Ranges<S, T> {
  using Base = Ranges<S, T>;
  using Base::a, Base::D, Base::Dv, Base::Dp, Base::Dvp, Base::kN, Base::x, Base::softmax, Base::s,
      Base::stride, Base::now, Base::c0, Base::members;
  const AttendFwd& p;
  T* o;            // [queries][Dvp]
  T *top, *total;  // per query: the largest score, in units of log 2, and the sum of exp

  explicit Forward(const AttendFwd& params) : Base(params.a, params.a.plan, false), p(params) {
    this->other_rows[0] = a.k, this->other_rows[1] = a.v, this->centre_rows[0] = a.q;
    this->results[1] = p.out;
  }

  void carve(cpu::Arena& arena) {
    Base::carve(arena);
    const int64_t queries = round_up(a.plan.q_slots, kN);
    o = arena.take<T>(queries * Dvp), top = arena.take<T>(queries), total = arena.take<T>(queries);
  }

  void row(int64_t item, int64_t end, int32_t h0, int32_t h1) {
    this->set_row(item, end);
    const int32_t slabs = x.slabs(this->slab_rows);
    int32_t packed = -1;  // head of k and v
    for (int32_t h = h0; h < h1; ++h) {
      const int32_t kv = h / this->group;
      this->look_ahead(h, h0, h1);
      this->pack_queries(a.q, h, x.token, x.centres, D, Dp, T(a.scale), nullptr, this->centre);
      this->clear(o, int64_t(x.centres) * Dvp);
      for (int32_t c = 0; c < round_up(x.centres, kN); ++c)
        top[c] = softmax ? -T(__builtin_inf()) : T(0), total[c] = softmax ? T(0) : T(1);
      if (packed != kv) this->pack_extras(kv);
      for (int32_t i = 0; i < slabs; ++i) {
        if (slabs > 1 || packed != kv) pack_slab(x.slab(i, slabs), kv);
        this->bands([&] { band(h); });
      }
      packed = kv;
      write(h);
    }
  }
  void pack_slab(const Slab& slab, int32_t kv) {
    this->slab = slab;
    const int32_t* tokens = x.other_token + slab.first;
    this->pack_keys(a.k, kv, tokens, slab.size, D, Dp, this->rows);
    this->pack_keys(a.v, kv, tokens, slab.size, Dv, Dvp, this->rows_v);
  }

  void band(int32_t h) {
    this->step_ahead(h);
    for (int32_t u = 0; u < members; ++u) this->scores(u, h);
    softmax ? weights() : activate_all();
    for (int32_t u = 0; a.dropout_p > 0 && u < members; ++u) this->keep(u, h), this->drop(u, s + u * stride);
    T* out = o + int64_t(c0) * Dvp;
    this->weigh_windows(s, this->rows_v, Dvp, out);
    if (!this->extras || !this->first_slab()) return;
    for (int32_t u = 0; u < members; ++u)
      weigh(Dvp / kN, s + u * stride + this->window_slots(now[u]), this->extra_v, this->extra_at_v,
            this->extras, out + int64_t(u) * Dvp);
  }
  // Scores become weights, relative to the largest score so far. In steps of all members: each of them waits
  // for its own results.
  [[gnu::noinline]] void weights() {
    const Vec<T> lowest = splat(-T(__builtin_inf()));
    Vec<T> base[kBand], sum[kBand];
    for (int32_t u = 0; u < members; ++u) {
      const T* line = s + u * stride;
      Vec<T> most = splat(top[c0 + u]);
      for (int32_t i = 0, n = this->slots(now[u]); i < n; i += kN) most = maximum(most, load(line + i));
      base[u] = most;
    }
    for (int32_t u = 0; u < members; ++u) {
      base[u] = most_across<T>(base[u]);
      base[u] = base[u] == lowest ? Vec<T>{} : base[u];
    }
    for (int32_t u = 0; u < members; ++u) {
      T* line = s + u * stride;
      sum[u] = Vec<T>{};
      for (int32_t i = 0, n = this->slots(now[u]); i < n; i += kN) {
        const Vec<T> e = exp2(load(line + i) - base[u]);
        sum[u] += e;
        store(line + i, e);
      }
    }
    for (int32_t u = 0; u < members; ++u) {
      const int32_t c = c0 + u;
      sum[u] = sum_across<T>(sum[u]);
      if (!this->first_slab()) {
        const Vec<T> shrink = exp2(splat(top[c]) - base[u]);
        sum[u] += total[c] * shrink;
        T* out = o + int64_t(c) * Dvp;
        for (int32_t d = 0; d < Dvp; d += kN) store(out + d, load(out + d) * shrink);
      }
      top[c] = base[u][0], total[c] = sum[u][0];
    }
  }
  void activate_all() {
    for (int32_t u = 0; u < members; ++u) {
      T* line = s + u * stride;
      for (int32_t i = 0; i < this->slots(now[u]); i += kN)
        store(line + i, activate<T>(a.activation, load(line + i)));
    }
  }

  [[gnu::noinline]] void write(int32_t h) {
    for (int32_t c = 0; c < x.centres; c += kN) {
      const Vec<T> l = load(total + c), m = load(top + c);
      store(total + c, l == Vec<T>{} ? Vec<T>{} : T(1) / l);
      store(top + c, l == Vec<T>{} ? splat(-T(__builtin_inf())) : (m + log2(l)) * T(kFromLog2));
    }
    for (int32_t c = 0; c < x.centres; ++c) {
      const int32_t token = x.token[c];
      this->write_row(o + int64_t(c) * Dvp, total[c], row_of<S>(p.out, this->b, token, h), Dv);
      if (p.lse) static_cast<T*>(p.lse)[(this->b * a.n_q + token) * p.lse_stride_n + h] = top[c];
    }
  }
};

template <class S, class T>
void run(const AttendFwd& p, int threads) {
  if (p.a.heads == 0) return;
  Forward<S, T> counted(p);
  const double flops = 2.0 * p.a.plan.q_slots * p.a.plan.k_slots * (p.a.head_dim + p.a.head_dim_v);
  const Schedule plan = make_schedule(p.a, 1, flops);
  cpu::Arena counter(nullptr);
  counted.carve(counter);
  const int64_t chunks = plan.chunks();
  const int team = static_cast<int>(at_least(threads < chunks ? threads : chunks, 1));
#pragma omp parallel num_threads(team) if (team > 1)
  {
    Forward<S, T> w(p);
    cpu::Arena arena(cpu::thread_scratch(counter.used()));
    w.carve(arena);
    w.start();
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Range r = plan.range(p.a, chunk);
      for (int64_t item = r.begin; item < r.end; ++item) w.row(item, r.end, r.h0, r.h1);
    }
  }
}

}  // namespace

void attend_ranges_fwd(const AttendFwd& p, int threads) {
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
