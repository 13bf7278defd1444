// context attention, backward: query after query, in two sweeps over the keys of its segment
// (context_block.h).
//
//   dP_ij = do_i . (v_j + Tv)   delta_i = sum_j p dP - dlse_i   dX_ij = p_ij (dP_ij - delta_i)
//   dq_i = scale sum_j dX (k_j + Tq)   dk_j = sum_i dX (scale q_i + Tk)   dv_j = sum_i p do_i
//   dTq[r_a] += dX scale q_i   dTk[r_a] += dX k_j   dTv[r_a] += p do_i, on each axis
//
// A task (run of plan rows, head) adds to tables of its own, which are summed in the order of the runs.
#include <cstdlib>

#include "context_block.h"

namespace vicinal::VICINAL_ISA {
namespace {

template <class S, class T, int kV>
struct ContextBackward : ContextBlock<S, T, kV> {
  using Base = ContextBlock<S, T, kV>;
  using Base::a, Base::h, Base::k, Base::kN, Base::nk, Base::s, Base::v, Base::vectors, Base::vectors_v;
  const ContextBwd& p;
  T *dout, *dq;       // [width_v], [width]
  T *dp, *dk, *dv;    // per key: dP, then dX; [k_most][width], [k_most][width_v]
  T* sums = nullptr;  // the task's tables

  explicit ContextBackward(const ContextBwd& params) : Base(params.a), p(params) {}
  void carve(cpu::Arena& arena) {
    Base::carve(arena);
    dout = arena.take<T>(a.width_v), dq = arena.take<T>(a.width), dp = arena.take<T>(this->k_most());
    dk = arena.take<T>(this->k_most() * a.width), dv = arena.take<T>(this->k_most() * a.width_v);
  }

  void row(int64_t index) {
    this->set_row(index);
    for (int64_t i = 0; i < int64_t(nk) * a.width; i += kN) store(dk + i, Vec<T>{});
    for (int64_t i = 0; i < int64_t(nk) * a.width_v; i += kN) store(dv + i, Vec<T>{});
    for (int32_t i = 0; i < this->nq; ++i) query(this->queries[i].token);
    for (int32_t j = 0; j < nk; ++j) {
      const int64_t token = this->keys[j].token;
      Base::unpack(dk + int64_t(j) * a.width, T(1), row_of<S>(p.dk, 0, token, h), a.head_dim);
      Base::unpack(dv + int64_t(j) * a.width_v, T(1), row_of<S>(p.dv, 0, token, h), a.head_dim_v);
    }
  }
  void query(int64_t token) {
    int64_t at[kContextAxes];
    this->locate(token, at);
    Base::pack(row_of<S>(a.q, 0, token, h), a.head_dim, T(a.scale), this->q, a.width);
    Base::pack(row_of<S>(p.dout, 0, token, h), a.head_dim_v, T(1), dout, a.width_v);
    this->scores(at);
    weight_gradients(at);
    weights(token);
    key_gradients(at);
    Base::unpack(dq, T(a.scale), row_of<S>(p.dq, 0, token, h), a.head_dim);
  }
  // dp = dP.
  void weight_gradients(const int64_t* at) {
    for (int32_t j0 = 0; j0 < nk; j0 += kN) {
      Vec<T> r[kN];
      for (int32_t u = 0; u < kN; ++u) {
        const int32_t* f = this->offset + (j0 + u) * kContextAxes;
        const T* tables = this->tables + 2 * a.width;
        const T *x = tables + at[0] - f[0], *y = tables + at[1] - f[1], *z = tables + at[2] - f[2];
        const T* value = v + int64_t(j0 + u) * a.width_v;
        r[u] = Vec<T>{};
#pragma GCC unroll 4
        for (int32_t c = 0; c < vectors_v; ++c) {
          const int32_t d = c * kN;
          r[u] += load(dout + d) * (load(value + d) + load(x + d) + load(y + d) + load(z + d));
        }
      }
      store(dp + j0, sum_each<T>(r));
    }
  }
  // s = p, which adds up to 1 whatever the rounding of lse, and dp = dX.
  void weights(int64_t token) {
    const T infinite = T(__builtin_inf()), lse = static_cast<const T*>(p.lse)[token * p.lse_stride_n + h];
    const bool some = lse != -infinite;
    Vec<T> total = {}, products = {};
    for (int32_t j = 0; j < nk; j += kN) {
      const Vec<T> w = some ? exp2((load(s + j) - lse) * T(kLog2E)) : Vec<T>{};
      total += w, products += w * load(dp + j);
      store(s + j, w);
    }
    const T sum = sum_lanes<T>(total), inverse = sum > 0 ? 1 / sum : T(0);
    T delta = sum_lanes<T>(products) * inverse;
    if (p.dlse && some) delta -= static_cast<const T*>(p.dlse)[token * p.lse_stride_n + h];
    for (int32_t j = 0; j < nk; j += kN) {
      const Vec<T> w = load(s + j) * inverse;
      store(s + j, w), store(dp + j, w * (load(dp + j) - delta));
    }
  }
  void key_gradients(const int64_t* at) {
    for (int32_t c = 0; c < vectors; ++c) store(dq + c * kN, Vec<T>{});
    for (int32_t j = 0; j < nk; ++j) {
      const int32_t* f = this->offset + j * kContextAxes;
      const int64_t rows[kContextAxes] = {at[0] - f[0], at[1] - f[1], at[2] - f[2]};
      const T *x = this->tables + rows[0], *y = this->tables + rows[1], *z = this->tables + rows[2];
      T *dx = sums + rows[0], *dy = sums + rows[1], *dz = sums + rows[2];
      const Vec<T> g = splat(dp[j]), w = splat(s[j]);
#pragma GCC unroll 4
      for (int32_t c = 0; c < vectors; ++c) {
        const int32_t d = c * kN, e = d + a.width;
        const int64_t key = int64_t(j) * a.width + d;
        const Vec<T> kd = load(k + key), qd = load(this->q + d), gq = g * qd, gk = g * kd;
        store(dq + d, load(dq + d) + g * (kd + load(x + d) + load(y + d) + load(z + d)));
        store(dk + key, load(dk + key) + gq + g * (load(x + e) + load(y + e) + load(z + e)));
        store(dx + d, load(dx + d) + gq), store(dx + e, load(dx + e) + gk);
        store(dy + d, load(dy + d) + gq), store(dy + e, load(dy + e) + gk);
        store(dz + d, load(dz + d) + gq), store(dz + e, load(dz + e) + gk);
      }
#pragma GCC unroll 4
      for (int32_t c = 0; c < vectors_v; ++c) {
        const int32_t d = c * kN, e = d + 2 * a.width;
        const int64_t key = int64_t(j) * a.width_v + d;
        const Vec<T> wo = w * load(dout + d);
        store(dv + key, load(dv + key) + wo);
        store(dx + e, load(dx + e) + wo), store(dy + e, load(dy + e) + wo), store(dz + e, load(dz + e) + wo);
      }
    }
  }
};

template <class S, class T, int kV>
void run_tasks(const ContextBwd& p, int threads) {
  cpu::Arena counter(nullptr);
  ContextBackward<S, T, kV>(p).carve(counter);
  const ContextTasks tasks(p.a);
  const int64_t size = p.a.table_size();
  T* partials = static_cast<T*>(std::malloc(static_cast<size_t>(tasks.count() * size + 1) * sizeof(T)));
  if (!partials) std::abort();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    ContextBackward<S, T, kV> w(p);
    cpu::Arena arena(cpu::thread_scratch(counter.used()));
    w.carve(arena);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks.count(); ++task) {
      w.set_head(static_cast<int32_t>(task % p.a.heads));
      w.sums = partials + task * size;
      for (int64_t i = 0; i < size; ++i) w.sums[i] = 0;
      const int64_t run = task / p.a.heads;
      for (int64_t r = tasks.bounds[run]; r < tasks.bounds[run + 1]; ++r) w.row(r);
    }
#pragma omp for schedule(static)
    for (int32_t h = 0; h < p.a.heads; ++h) {
      T* to = static_cast<T*>(p.dtables) + h * size;
      for (int64_t i = 0; i < size; ++i) to[i] = 0;
      for (int64_t run = 0; run < ContextTasks::kRuns; ++run) {
        const T* from = partials + (run * p.a.heads + h) * size;
        for (int64_t i = 0; i < size; ++i) to[i] += from[i];
      }
    }
  }
  std::free(partials);
}
template <class S, class T>
void run(const ContextBwd& p, int threads) {
  if (context_is_narrow<S, T>(p.a)) return run_tasks<S, T, kContextWidth / kLanes<T>>(p, threads);
  run_tasks<S, T, 0>(p, threads);
}

}  // namespace

void context_bwd(const ContextBwd& p, int threads) {
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
