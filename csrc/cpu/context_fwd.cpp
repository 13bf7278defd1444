// context attention, forward: query after query against the keys of its segment (context_block.h).
#include "context_block.h"

namespace vicinal::VICINAL_ISA {
namespace {

template <class S, class T, int kV>
struct ContextForward : ContextBlock<S, T, kV> {
  using Base = ContextBlock<S, T, kV>;
  using Base::a, Base::h, Base::kN, Base::nk, Base::s;
  const ContextFwd& p;
  T* o;  // [width_v]

  explicit ContextForward(const ContextFwd& params) : Base(params.a), p(params) {}
  void carve(cpu::Arena& arena) {
    Base::carve(arena);
    o = arena.take<T>(a.width_v);
  }

  void row(int64_t index) {
    this->set_row(index);
    for (int32_t i = 0; i < this->nq; ++i) {
      const int64_t token = this->queries[i].token;
      int64_t at[kContextAxes];
      this->locate(token, at);
      Base::pack(row_of<S>(a.q, 0, token, h), a.head_dim, T(a.scale), this->q, a.width);
      this->scores(at);
      T top;
      const T sum = weights(&top);
      values(at);
      const T lse = sum > 0 ? top + log2(splat(sum))[0] * T(kLn2) : -T(__builtin_inf());
      static_cast<T*>(p.lse)[token * p.lse_stride_n + h] = lse;
      Base::unpack(o, sum > 0 ? 1 / sum : T(0), row_of<S>(p.out, 0, token, h), a.head_dim_v);
    }
  }
  // exp(s - top) in place; returns their sum.
  T weights(T* top) {
    const T infinite = T(__builtin_inf());
    Vec<T> most = splat(-infinite), total = {};
    for (int32_t j = 0; j < nk; j += kN) most = maximum(most, load(s + j));
    T base = -infinite;
    for (int32_t u = 0; u < kN; ++u) base = base > most[u] ? base : most[u];
    *top = base == -infinite ? T(0) : base;
    for (int32_t j = 0; j < nk; j += kN) {
      const Vec<T> e = exp2((load(s + j) - *top) * T(kLog2E));
      total += e;
      store(s + j, e);
    }
    return sum_lanes<T>(total);
  }
  // o = sum over the keys of weight (v + Tv).
  void values(const int64_t* at) {
    constexpr int kTogether = kV ? kV : 1;
    for (int32_t c0 = 0; c0 < this->vectors_v; c0 += kTogether) {
      Vec<T> sum[kTogether] = {};
      for (int32_t j = 0; j < nk; ++j) {
        const int32_t* f = this->offset + j * kContextAxes;
        const T* tables = this->tables + 2 * a.width + c0 * kN;
        const T *x = tables + at[0] - f[0], *y = tables + at[1] - f[1], *z = tables + at[2] - f[2];
        const T* value = this->v + int64_t(j) * a.width_v + c0 * kN;
#pragma GCC unroll 4
        for (int c = 0; c < kTogether; ++c) {
          const int d = c * kN;
          sum[c] += s[j] * (load(value + d) + load(x + d) + load(y + d) + load(z + d));
        }
      }
      for (int c = 0; c < kTogether; ++c) store(o + (c0 + c) * kN, sum[c]);
    }
  }
};

template <class S, class T, int kV>
void run_tasks(const ContextFwd& p, int threads) {
  cpu::Arena counter(nullptr);
  ContextForward<S, T, kV>(p).carve(counter);
  const ContextTasks tasks(p.a);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    ContextForward<S, T, kV> w(p);
    cpu::Arena arena(cpu::thread_scratch(counter.used()));
    w.carve(arena);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks.count(); ++task) {
      w.set_head(static_cast<int32_t>(task % p.a.heads));
      const int64_t run = task / p.a.heads;
      for (int64_t r = tasks.bounds[run]; r < tasks.bounds[run + 1]; ++r) w.row(r);
    }
  }
}
template <class S, class T>
void run(const ContextFwd& p, int threads) {
  if (context_is_narrow<S, T>(p.a)) return run_tasks<S, T, kContextWidth / kLanes<T>>(p, threads);
  run_tasks<S, T, 0>(p, threads);
}

}  // namespace

void context_fwd(const ContextFwd& p, int threads) {
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
