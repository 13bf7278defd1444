// Linear attention without a mask: the sums of all keys, then every query reads them.
//
// Work per token and head, K = V = 64: forward 4 K V = 16 kflop against 1 KiB of q, k, v and out in float32;
// forward and backward 12 K V against 11 tensors, since the backward reads q and dout to write dq, then k and
// v to write dk and dv. At 16 flop/byte a core with 240 GFLOP/s and 15 GB/s is bound by both, and the
// exponentials of elu + 1 add a fifth to the multiply-adds: about 70% of the FMA rate is the most to expect.
// Measured on one thread of a Zen 5 that other work was using, against multiply-adds out of registers in the
// same run: 69-74% forward, 56-64% forward and backward (B4 H8 N4096 and B1 H8 N16384); K = V = 32 in NCHW,
// where every tile of values is transposed, 53%.
#include "linear_kernels.h"

namespace vicinal::VICINAL_ISA {
namespace {

// Memory of a call besides what each thread has: partial sums of every run, and sums of every sequence.
template <class T>
struct Shared {
  const Sizes<T> z;
  int32_t heads;
  bool gradients;
  T *partials, *sums, *grads;

  int64_t stride() const { return round_up_64(z.s() + z.Kdp); }
  int64_t padded() const { return round_up_64(z.s() + z.st() + z.Kdp); }
  static int64_t round_up_64(int64_t n) { return (n + 15) / 16 * 16; }

  Shared(const Linear& a, bool backward) : z(a), heads(a.heads), gradients(backward) {}
  void carve(cpu::Arena& arena, int64_t runs, int64_t sequences) {
    partials = arena.take<T>(runs * heads * stride());
    sums = arena.take<T>(sequences * heads * padded());
    grads = gradients ? arena.take<T>(sequences * heads * padded()) : nullptr;
  }
  Sums<T> partial(int64_t run, int32_t h) const {
    T* at = partials + (run * heads + h) * stride();
    return {at, nullptr, at + z.s()};
  }
  Sums<T> of(T* base, int64_t r, int32_t h) const {
    T* at = base + (r * heads + h) * padded();
    return {at, at + z.s(), at + z.s() + z.st()};
  }
};

template <class T>
void clear_sums(const Sums<T>& x, const Sizes<T>& z) {
  fill(x.s, T(0), z.s());
  fill(x.z, T(0), z.Kdp);
}

// to = initial + the partial sums of the sequence's runs, in order.
template <class T>
void total(const Shared<T>& m, const Runs& runs, int64_t r, int32_t h, const void* s, const void* z,
           const Sums<T>& to) {
  load_sums(s, z, r * m.heads + h, m.z, to);
  for (int64_t run = runs.first(r); run < runs.first(r + 1); ++run) {
    const Sums<T> part = m.partial(run, h);
    add_into(to.s, part.s, m.z.s());
    add_into(to.z, part.z, m.z.Kdp);
  }
}

template <class S, class T>
void sum_keys(Head<S, T>& w, const Shared<T>& m, const Runs& runs, int64_t run, int32_t h0, int32_t h1) {
  const Sequence s = runs.tokens(run, runs.sequence(run));
  const int32_t g = m.z.shared;
  for (int32_t h = h0 * g; h < h1 * g; ++h) clear_sums(m.partial(run, h), m.z);
  const bool columns = w.keys_by_columns();
  const Walk walk(w.a.k, s, h1 - h0);
  for (int64_t at = 0; at < walk.count(); ++at) {
    const int32_t hk = h0 + walk.head(at);
    set_next(w, walk, at, s, h0, w.a.k, nullptr, w.a.v, nullptr);
    w.set_tile(s.sample, s.begin + walk.tile(at) * kTile, tile_tokens(s, walk.tile(at)));
    if (columns) {
      w.load_columns(w.a.k, hk, w.a.map_k, w.a.param_k, 1.0, w.p);
    } else {
      w.load_k(hk);
    }
    for (int32_t h = hk * g; h < (hk + 1) * g; ++h) {
      w.load_v(h);
      if (columns) {
        w.add_columns(m.partial(run, h));
      } else {
        w.add(m.partial(run, h));
      }
    }
  }
}

template <class S, class T>
void read_queries(Head<S, T>& w, const LinearFwd& p, const Shared<T>& m, const Runs& runs, int64_t run,
                  int32_t h0, int32_t h1) {
  const int64_t r = runs.sequence(run);
  const Sequence s = runs.tokens(run, r);
  const int32_t g = m.z.shared;
  const bool columns = w.queries_by_columns(p.out);
  const Walk walk(p.a.q, s, h1 - h0);
  for (int64_t at = 0; at < walk.count(); ++at) {
    const int32_t hq = h0 + walk.head(at);
    set_next(w, walk, at, s, h0, p.a.q, nullptr, p.out, nullptr);
    w.set_tile(s.sample, s.begin + walk.tile(at) * kTile, tile_tokens(s, walk.tile(at)));
    if (columns) {
      w.load_columns(p.a.q, hq, p.a.map_q, p.a.param_q, p.a.scale, w.f);
    } else {
      w.load_q(hq);
    }
    for (int32_t h = hq * g; h < (hq + 1) * g; ++h) {
      if (columns) {
        w.read_columns(p, h, m.of(m.sums, r, h));
      } else {
        w.read(p, h, m.of(m.sums, r, h));
      }
    }
  }
}

template <class S, class T>
void read_gradients(Head<S, T>& w, const LinearBwd& p, const Shared<T>& m, const Runs& runs, int64_t run,
                    int32_t h0, int32_t h1) {
  const int64_t r = runs.sequence(run);
  const Sequence s = runs.tokens(run, r);
  const int32_t g = m.z.shared;
  for (int32_t h = h0 * g; h < h1 * g; ++h) clear_sums(m.partial(run, h), m.z);
  const Walk walk(p.a.q, s, h1 - h0);
  for (int64_t at = 0; at < walk.count(); ++at) {
    const int32_t hq = h0 + walk.head(at);
    set_next(w, walk, at, s, h0, p.a.q, &p.dq, p.dout, nullptr);
    w.set_tile(s.sample, s.begin + walk.tile(at) * kTile, tile_tokens(s, walk.tile(at)));
    w.load_q(hq);
    w.begin_gather();
    for (int32_t h = hq * g; h < (hq + 1) * g; ++h) {
      w.load_dout(p, h);
      w.read_gradient(m.of(m.sums, r, h), m.partial(run, h));
      w.gather();
    }
    w.store_dq(p, hq);
  }
}

template <class S, class T>
void add_gradients(Head<S, T>& w, const LinearBwd& p, const Shared<T>& m, const Runs& runs, int64_t run,
                   int32_t h0, int32_t h1) {
  const int64_t r = runs.sequence(run);
  const Sequence s = runs.tokens(run, r);
  const int32_t g = m.z.shared;
  const Walk walk(p.a.k, s, h1 - h0);
  for (int64_t at = 0; at < walk.count(); ++at) {
    const int32_t hk = h0 + walk.head(at);
    set_next(w, walk, at, s, h0, p.a.k, &p.dk, p.a.v, &p.dv);
    w.set_tile(s.sample, s.begin + walk.tile(at) * kTile, tile_tokens(s, walk.tile(at)));
    w.load_k(hk);
    w.begin_gather();
    for (int32_t h = hk * g; h < (hk + 1) * g; ++h) {
      w.load_v(h);
      w.add_gradient(p, h, m.of(m.grads, r, h));
      w.gather();
    }
    w.store_dk(p, hk);
  }
}

}  // namespace

template <class S, class T>
void full_fwd(const LinearFwd& p, int threads) {
  const Linear& a = p.a;
  const Runs keys(a, a.n_k), queries(a, a.n_q);
  Shared<T> m(a, false);
  const int32_t step = heads_of_task(a, keys.count() < queries.count() ? keys.count() : queries.count(),
                                     m.stride() * m.z.shared * sizeof(T));
  const int64_t groups = step ? (a.heads_qk + step - 1) / step : 0;
  Team<S, T> team(a, false, threads, [&](cpu::Arena& arena) { m.carve(arena, keys.count(), a.sequences); });
#pragma omp parallel num_threads(team.threads) if (team.threads > 1)
  {
    Head<S, T> w(a);
    team.start(w);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < keys.count() * groups; ++task) {
      const int32_t h0 = static_cast<int32_t>(task % groups) * step;
      sum_keys(w, m, keys, task / groups, h0, h0 + step < a.heads_qk ? h0 + step : a.heads_qk);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.sequences * a.heads; ++i) {
      const int64_t r = i / a.heads;
      const int32_t h = static_cast<int32_t>(i % a.heads);
      const Sums<T> sums = m.of(m.sums, r, h);
      total(m, keys, r, h, a.initial_s, a.initial_z, sums);
      store_sums(sums, m.z, p.final_s, p.final_z, i);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < queries.count() * groups; ++task) {
      const int32_t h0 = static_cast<int32_t>(task % groups) * step;
      read_queries(w, p, m, queries, task / groups, h0, h0 + step < a.heads_qk ? h0 + step : a.heads_qk);
    }
  }
}

template <class S, class T>
void full_bwd(const LinearBwd& p, int threads) {
  const Linear& a = p.a;
  const Runs keys(a, a.n_k), queries(a, a.n_q);
  Shared<T> m(a, true);
  const int32_t step = heads_of_task(a, keys.count() < queries.count() ? keys.count() : queries.count(),
                                     2 * m.padded() * m.z.shared * sizeof(T));
  const int64_t groups = step ? (a.heads_qk + step - 1) / step : 0;
  Team<S, T> team(a, true, threads, [&](cpu::Arena& arena) { m.carve(arena, queries.count(), a.sequences); });
#pragma omp parallel num_threads(team.threads) if (team.threads > 1)
  {
    Head<S, T> w(a);
    team.start(w);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.sequences * a.heads; ++i) {
      const Sums<T> sums = m.of(m.sums, i / a.heads, static_cast<int32_t>(i % a.heads));
      load_sums(p.final_s, p.final_z, i, m.z, sums);
      transpose_sums(sums, m.z);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < queries.count() * groups; ++task) {
      const int32_t h0 = static_cast<int32_t>(task % groups) * step;
      read_gradients(w, p, m, queries, task / groups, h0, h0 + step < a.heads_qk ? h0 + step : a.heads_qk);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.sequences * a.heads; ++i) {
      const int64_t r = i / a.heads;
      const int32_t h = static_cast<int32_t>(i % a.heads);
      const Sums<T> grads = m.of(m.grads, r, h);
      total(m, queries, r, h, p.dfinal_s, p.dfinal_z, grads);
      transpose_sums(grads, m.z);
      store_sums(grads, m.z, p.dinitial_s, p.dinitial_z, i);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < keys.count() * groups; ++task) {
      const int32_t h0 = static_cast<int32_t>(task % groups) * step;
      add_gradients(w, p, m, keys, task / groups, h0, h0 + step < a.heads_qk ? h0 + step : a.heads_qk);
    }
  }
}

#define INSTANTIATE(S, T)                              \
  template void full_fwd<S, T>(const LinearFwd&, int); \
  template void full_bwd<S, T>(const LinearBwd&, int);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(BFloat16, float)
INSTANTIATE(Half, float)
#undef INSTANTIATE

}  // namespace vicinal::VICINAL_ISA
