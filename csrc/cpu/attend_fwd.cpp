// attend, forward: per row and head, blocks of queries against all keys (block.h).
//
// Floor of 8 x 56 x 56 tokens, 3 heads of 32, windows of 7 x 7, float32: 472 MFLOP, 1.8 ms on one Zen 5 core
// (257 GF/s), and 38.5 MB, 0.9 ms. Packing K, V and out cost 27% of 5.2 ms, so reading K and V in place and
// writing out from the tiles should have brought 4.2 ms; measured 4.7 ms, since the loads that missed now do
// so in the tiles and in the prefetches. bfloat16 in pairs: a floor of 0.9 ms and half the traffic; predicted
// 3.0 ms, measured 3.3 ms (4.8 ms when it was converted to float).
//
// Tried and no faster: V packed over K and out over Q^T (12 KB less, within noise); prefetch into the second
// level (within noise); one burst of prefetches while packing (6.4 against 5.3 ms spread over the tiles;
// none: 9.7 ms); 2^x by adding 1.5 * 2^23 instead of vreduceps and vscalefps (6.1 against 3.9 cycles a
// vector); non-temporal stores of out and of the gradients (0-2%); chunks of one head (13% slower: the heads
// of a token share pages and prefetches).
//
// On a Zen 3 core (AVX2, 32 KB of first-level cache; one thread, interleaved): 32 queries a block instead of
// 64 are 1.08-1.17 times as fast; the backward loses with 32 (0.88-0.97), since it packs then. Without
// prefetches windows of 7 x 7 take 1.5 times as long.
#include "block.h"
#include "pairs.h"
#include "schedule.h"
#include "weights.h"

namespace vicinal::VICINAL_ISA {

void attend_ranges_fwd(const AttendFwd& p, int threads);

namespace {

template <class S, class T>
struct Forward : Block<S, T, kForwardQueries> {
  using Base = Block<S, T, kForwardQueries>;
  using Base::a, Base::D, Base::Dv, Base::Dp, Base::Dvp, Base::kN, Base::now, Base::n, Base::q0, Base::s,
      Base::column, Base::here;
  const AttendFwd& p;
  T* o;  // [kForwardQueries][Dvp]
  T top[kForwardQueries], sum[kForwardQueries],
      inverse[kForwardQueries];  // per query: maximum, sum of exp, 1 / sum

  static constexpr bool kSame = std::is_same_v<S, T>;
  const bool pairs = can_pair<S>(a);

  explicit Forward(const AttendFwd& params) : Base(params.a), p(params) {
    this->write_q = p.out;
    this->k_in_place = kSame && !a.k_scale, this->v_in_place = kSame && Dv % kN == 0;
  }

  void carve(cpu::Arena& arena, int32_t group_heads) {
    Base::carve(arena, group_heads);
    o = arena.take<T>(int64_t(kForwardQueries) * Dvp);
  }

  void row(int32_t h0, int32_t h1) {
    if (this->bias && !this->bias_is_current(h0, h1)) this->expand_bias(h0, h1);
    const int32_t blocks = this->blocks(), strips = (this->block_size(0) + 11) / 12;
    for (int32_t h = h0; h < h1; ++h) {
      this->open(h);
      if (!pairs) this->pack_keys(h);
      if constexpr (kHasPairs<S>) {
        if (pairs) interleave_rows(here->v, now->nk, Dv, Dvp, this->v);
      }
      this->look_ahead(h, h0, h1, blocks * ((now->nk + 7) / 8 + strips));
      for (int32_t begin = 0; begin < now->nq; begin += n) {
        this->set_block(begin, this->block_size(begin));
        block(h);
      }
    }
  }

  void block(int32_t h) {
    if constexpr (kHasPairs<S>) {
      if (pairs) return block_of_pairs(h);
    }
    this->pack_queries(here->q, D, Dp, T(a.scale), this->q_scales(h), this->unit, this->q, this->q_rows,
                       false);
    this->scores(h, T(1));
    for (int32_t c = 0; c < this->vectors * kN; c += kN) weights(c);
    for (int32_t u = 0; u < this->tails; ++u) tail_weights(this->column_of_tail(u));
    finish_sums(h);
    if (a.dropout_p > 0) this->drop(h, s);
    Gemm<T> product{s,   kForwardQueries, this->v, Dvp,         nullptr, 0, o,
                    Dvp, &this->ahead,    nullptr, this->v_rows};
    bool direct = false;
    if constexpr (kSame) {
      direct = Dv % kN == 0 && !now->q_pads;
      if (direct) product.c_rows = here->to_q + q0;
      if (direct && a.activation == kSoftmax) product.c_factor = inverse;
    }
    gemm_columns(product, n, now->nk, Dvp / kN);
    if (!direct) write();
  }

  void block_of_pairs(int32_t h) {
    pair_scores(*this, h);
    for (int32_t c = 0; c < this->vectors * kN; c += kN) pair_weights(c);
    for (int32_t u = 0; u < this->tails; ++u) {
      const int32_t c = this->column_of_tail(u), steps = gather(c);
      tail_softmax(c, steps);
      pair_column(column, steps * kN);
      for (int32_t j = 0; j < (now->nk + 1) / 2; ++j) s[int64_t(j) * kForwardQueries + c] = column[j];
    }
    finish_sums(h);
    PairGemm g{nullptr, s, kForwardQueries, this->v, Dvp, 1, nullptr, 0, nullptr, 0};
    g.c_rows = here->to_q + q0, g.c_factor = inverse, g.c_width = Dv, g.ahead = &this->ahead;
    pair_columns(g, n, (now->nk + 1) / 2, Dvp / kN);
  }
  // A vector of queries: pairs of weights in place of the first half of the scores, top and sum at c.
  [[gnu::noinline]] void pair_weights(int32_t c) {
    const Vec<T> lowest = splat(-T(__builtin_inf()));
    T *const begin = s + c, *const end = begin + int64_t(now->nk) * kForwardQueries;
    Vec<T> most = lowest, total = {};
    for (const T* x = begin; x < end; x += kForwardQueries) most = maximum(most, load(x));
    const Vec<T> base = most == lowest ? Vec<T>{} : most;
    T* to = begin;
    for (const T* x = begin; x < end; x += 2 * kForwardQueries, to += kForwardQueries) {
      const Vec<T> low = exp2(load(x) - base);
      const Vec<T> high = x + kForwardQueries < end ? exp2(load(x + kForwardQueries) - base) : Vec<T>{};
      total += low + high;
      store_pairs(to, interleave(round_two(low, high)));
    }
    store(top + c, base), store(sum + c, total);
  }

  // A vector of queries: weights in place, top and sum at c.
  [[gnu::noinline]] void weights(int32_t c) {
    const Vec<T> lowest = splat(-T(__builtin_inf()));
    T *const begin = s + c, *const end = begin + int64_t(now->nk) * kForwardQueries;
    const bool softmax = a.activation == kSoftmax;
    if (softmax || p.lse) {
      Vec<T> most = lowest, total = {};
      for (const T* x = begin; x < end; x += kForwardQueries) most = maximum(most, load(x));
      const Vec<T> base = most == lowest ? Vec<T>{} : most;
      const T to_log2 = softmax ? T(1) : T(kLog2E);
      if (softmax) {
        for (T* x = begin; x < end; x += kForwardQueries) {
          const Vec<T> e = exp2(load(x) - base);
          total += e;
          store(x, e);
        }
      } else {
        for (const T* x = begin; x < end; x += kForwardQueries) total += exp2((load(x) - base) * to_log2);
      }
      store(top + c, base * to_log2), store(sum + c, total);
    }
    if (softmax) return;
    for (T* x = begin; x < end; x += kForwardQueries) store(x, activate<T>(a.activation, load(x)));
  }
  // The same for one query: its keys become the lanes.
  [[gnu::noinline]] void tail_weights(int32_t c) {
    const int32_t nk = now->nk, steps = gather(c);
    if (a.activation == kSoftmax || p.lse) {
      tail_softmax(c, steps);
    } else {
      for (int32_t u = 0; u < steps; ++u)
        store(column + u * kN, activate<T>(a.activation, load(column + u * kN)));
    }
    for (int32_t j = 0; j < nk; ++j) s[int64_t(j) * kForwardQueries + c] = column[j];
  }
  // The scores of a query into `column`, which has so many vectors.
  int32_t gather(int32_t c) {
    const int32_t nk = now->nk, padded = round_up(nk, kN);
    for (int32_t j = 0; j < nk; ++j) column[j] = s[int64_t(j) * kForwardQueries + c];
    for (int32_t j = nk; j < padded; ++j) column[j] = -T(__builtin_inf());
    return padded / kN;
  }
  void tail_softmax(int32_t c, int32_t steps) {
    const bool softmax = a.activation == kSoftmax;
    const T to_log2 = softmax ? T(1) : T(kLog2E), infinite = T(__builtin_inf());
    Vec<T> most = splat(-infinite), total = {};
    for (int32_t u = 0; u < steps; ++u) most = maximum(most, load(column + u * kN));
    T base = -infinite;
    for (int32_t u = 0; u < kN; ++u) base = base > most[u] ? base : most[u];
    if (base == -infinite) base = 0;
    for (int32_t u = 0; u < steps; ++u) {
      const Vec<T> x = load(column + u * kN), e = exp2((x - base) * to_log2);
      total += e;
      store(column + u * kN, softmax ? e : activate<T>(a.activation, x));
    }
    top[c] = base * to_log2, sum[c] = sum_lanes<T>(total);
  }

  // 1 / sum, and lse to memory.
  [[gnu::noinline]] void finish_sums(int32_t h) {
    const bool softmax = a.activation == kSoftmax;
    T lse[kForwardQueries];
    for (int32_t c = 0; c < n; c += kN) {
      if (!softmax && !p.lse) break;
      const Vec<T> l = load(sum + c);
      store(inverse + c, l == Vec<T>{} ? Vec<T>{} : T(1) / l);
      store(lse + c, (load(top + c) + log2(l)) * T(kLn2));
    }
    for (int32_t c = 0; c < n && p.lse; ++c) {
      const int32_t token = now->q_token[q0 + c];
      if (token >= 0) static_cast<T*>(p.lse)[(now->b * a.n_q + token) * p.lse_stride_n + h] = lse[c];
    }
  }
  [[gnu::noinline]] void write() {
    const bool softmax = a.activation == kSoftmax;
    for (int32_t c = 0; c < n; ++c) {
      S* to = here->to_q[q0 + c];
      if (!to) continue;
      const T factor = softmax ? inverse[c] : T(1);
      const T* from = o + int64_t(c) * Dvp;
      int32_t d = 0;
      for (; d + kN <= Dv; d += kN) store_as(to + d, load(from + d) * factor);
      if (d < Dv) store_part<T>(to + d, load(from + d) * factor, Dv - d);
    }
  }
};

template <class S, class T>
void run(const AttendFwd& p, int threads) {
  if (p.a.heads == 0) return;
  Forward<S, T> counted(p);
  const double flops = 2.0 * p.a.plan.q_slots * counted.k_most * (p.a.head_dim + p.a.head_dim_v);
  const Schedule plan = make_schedule(p.a, counted.bias_stride() * sizeof(T), flops);
  cpu::Arena counter(nullptr);
  counted.carve(counter, plan.group_heads);
  const int64_t chunks = plan.chunks();
  const int team = static_cast<int>(at_least(threads < chunks ? threads : chunks, 1));
#pragma omp parallel num_threads(team) if (team > 1)
  {
    Forward<S, T> w(p);
    cpu::Arena arena(cpu::thread_scratch(counter.used()));
    w.carve(arena, plan.group_heads);
    w.clear_zeros();
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Range r = plan.range(p.a, chunk);
      for (int64_t item = r.begin; item < r.end; ++item) {
        w.advance(item, r.end);
        w.row(r.h0, r.h1);
      }
    }
  }
}

}  // namespace

void attend_fwd(const AttendFwd& p, int threads) {
  if (p.a.plan.guard) return attend_ranges_fwd(p, threads);
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
