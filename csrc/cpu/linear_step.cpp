// One token: the state is read and written once, which is all that it costs.
#include "linear_head.h"

namespace vicinal::VICINAL_ISA {
namespace {

template <class S, class T>
struct Step {
  const LinearStep& p;
  const Linear& a;
  Head<S, T> w;

  explicit Step(const LinearStep& step) : p(step), a(step.a), w(step.a) {}

  // s = keep s + f_k v^T and out = q s, a vector of values at a time for all features.
  void run(int64_t b, int32_t h) {
    const Sizes<T>& z = w.z;
    w.set_tile(b, 0, 1);
    w.load_q(h / z.shared);
    w.load_k(h / z.shared);
    w.load_v(h);
    const T keep = a.decay ? decay(b, h) : T(1);
    T* s = static_cast<T*>(p.s) + (b * a.heads + h) * z.K * z.dim_v;
    int32_t d = 0;
    for (; d + 4 * kLanes<T> <= z.dim_v; d += 4 * kLanes<T>) values<4>(s + d, w.v + d, keep, w.o + d);
    for (; d + kLanes<T> <= z.dim_v; d += kLanes<T>) values<1>(s + d, w.v + d, keep, w.o + d);
    if (d < z.dim_v) {
      const int n = z.dim_v - d;
      Vec<T> sum = {};
      for (int32_t k = 0; k < z.K; ++k) {
        T* at = s + int64_t(k) * z.dim_v + d;
        const Vec<T> x = load_part<T>(at, n) * keep + load(w.v + d) * w.p[k];
        store_part<T>(at, x, n);
        sum += x * w.f[k];
      }
      store(w.o + d, sum);
    }
    T factor = 1;
    if (a.normalize) factor = denominator(static_cast<T*>(p.z) + (b * a.heads + h) * z.K, keep);
    unpack_tile(w.o, z.Vp, &factor, w.place(p.out, h, z.dim_v));
  }
  T decay(int64_t b, int32_t h) const {
    constexpr T log2e = T(1.44269504088896340736);
    const T g = static_cast<const T*>(a.decay)[b * a.decay_stride_b + h * a.decay_stride_h];
    return exp2(splat(g * log2e))[0];
  }
  template <int kVectors>
  void values(T* s, const T* v, T keep, T* out) {
    Vec<T> x[kVectors], sum[kVectors];
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) x[u] = load(v + u * kLanes<T>), sum[u] = Vec<T>{};
    for (int32_t k = 0; k < w.z.K; ++k, s += w.z.dim_v) {
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u) {
        T* at = s + u * kLanes<T>;
        const Vec<T> y = load(at) * keep + x[u] * w.p[k];
        store(at, y);
        sum[u] += y * w.f[k];
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) store(out + u * kLanes<T>, sum[u]);
  }
  T denominator(T* sums, T keep) const {
    T den = T(a.eps);
    for (int32_t k = 0; k < w.z.K; ++k) {
      sums[k] = sums[k] * keep + w.p[k];
      den += sums[k] * w.f[k];
    }
    const T size = den < 0 ? -den : den;
    return size < T(kSmallestDen) ? T(0) : T(1) / den;
  }
};

template <class S, class T>
void run(const LinearStep& p, int threads) {
  const int64_t tasks = p.a.batch * p.a.heads;
  cpu::Arena counter(nullptr);
  Step<S, T> counted(p);
  counted.w.carve(counter, false);
  constexpr int64_t kWorthAThread = 32 * 1024;  // elements of the state
  const int64_t most = tasks * counted.w.z.s() / kWorthAThread;
  const int team = static_cast<int>(most < 1 ? 1 : most < threads ? most : threads);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    Step<S, T> step(p);
    cpu::Arena arena(cpu::thread_scratch(counter.used()));
    step.w.carve(arena, false);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      step.run(task / p.a.heads, static_cast<int32_t>(task % p.a.heads));
    }
  }
}

}  // namespace

void linear_step(const LinearStep& p, int threads) {
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
