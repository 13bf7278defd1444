// Runs the CPU kernels of one instruction set over random small problems with every option, and compares them
// with plain loops in double: results, gradients, and that one and two threads give the same bits. Built with
// sanitizers.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "attend_problem.h"
#include "cpu/memory.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace vicinal {
namespace VICINAL_ISA {
void attend_fwd(const AttendFwd& p, int threads);
void attend_bwd(const AttendBwd& p, int threads);
}  // namespace VICINAL_ISA
namespace cpu {
// A fresh block of the exact size for every call.
void* thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local size_t size = 0;
#if defined(__SANITIZE_ADDRESS__)
  if (memory) __asan_unpoison_memory_region(memory.get(), size);
#endif
  memory.reset(new char[size = bytes + 64]);
  std::memset(memory.get(), 0xff, size);  // NaN
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
}
}  // namespace cpu
}  // namespace vicinal

namespace native_test {

int failures = 0;

template <class X>
void compare(const char* what, unsigned seed, const Tensor<X>& got, const Tensor<double>& expected,
             double tolerance) {
  double most = 0.1, worst = 0;  // sums that cancel are compared with 0.1
  for (int64_t i = 0; i < expected.size(); ++i) {
    if (std::isfinite(expected.data[i])) most = std::max(most, std::fabs(expected.data[i]));
  }
  for (int64_t i = 0; i < expected.size(); ++i) {
    const double x = widen(got.data[i]), y = expected.data[i];
    const double error = x == y ? 0 : std::fabs(x - y) / most;
    worst = error <= worst ? worst : error;
    if (error != error) worst = INFINITY;
  }
  if (worst <= tolerance) return;
  std::printf("seed %u: %s is wrong by %g (tolerance %g)\n", seed, what, worst, tolerance);
  ++failures;
}

template <class S, class T>
struct Results {
  Tensor<S> out, dq, dk, dv;
  Tensor<T> lse, dbias, dextra_k, dextra_v;

  Results(const Problem<S, T>& p, int threads) {
    const Attend& a = p.a;
    out = Tensor<S>(a.batch, a.n_q, a.heads, a.head_dim_v), lse = Tensor<T>(a.batch, a.n_q, a.heads, 1);
    dq = Tensor<S>(a.batch, a.n_q, a.heads, a.head_dim), dk = Tensor<S>(a.batch, a.n_k, a.heads, a.head_dim);
    dv = Tensor<S>(a.batch, a.n_k, a.heads, a.head_dim_v), dbias = Tensor<T>(1, 1, a.heads, a.bias_size);
    dextra_k = Tensor<T>(a.batch, a.n_extra, a.heads, a.head_dim);
    dextra_v = Tensor<T>(a.batch, a.n_extra, a.heads, a.head_dim_v);
    for (auto* t : {&lse, &dbias, &dextra_k, &dextra_v}) std::fill_n(t->data.get(), t->size(), T(NAN));
    attend_fwd({a, out.rows(), lse.data.get(), a.heads}, threads);
    AttendBwd b{};
    b.a = a, b.out = out.rows(), b.dout = p.dout.rows(), b.lse = lse.data.get(), b.dlse = p.dlse.get();
    b.lse_stride_n = a.heads, b.dq = dq.rows(), b.dk = dk.rows(), b.dv = dv.rows();
    b.dbias = a.bias ? dbias.data.get() : nullptr;
    if (a.n_extra) b.dextra_k = dextra_k.rows(), b.dextra_v = dextra_v.rows();
    attend_bwd(b, threads);
  }
};

template <class X>
bool same_bits(const Tensor<X>& x, const Tensor<X>& y) {
  return !std::memcmp(x.data.get(), y.data.get(), x.size() * sizeof(X));
}

template <class S, class T>
void check(unsigned seed, double tolerance) {
  Random r(seed);
  std::vector<Axis> shape(1 + r.below(3));
  constexpr int widest[] = {90, 11, 4};
  for (Axis& x : shape) {
    x.window = 1 + r.below(widest[shape.size() - 1]);
    x.length = 1 + r.below(x.window * 5 / 2);
    x.shift = r.chance(0.6) ? r.below(x.window) : 0;
  }
  const Problem<S, T> p(r, shape);
  const Answer expected = solve(p);
  const Results<S, T> one(p, 1), two(p, 2);
  compare("out", seed, one.out, expected.out, tolerance);
  compare("lse", seed, one.lse, expected.lse, sizeof(T) == 8 ? 1e-11 : 1e-5);
  compare("dq", seed, one.dq, expected.dq, 16 * tolerance);
  compare("dk", seed, one.dk, expected.dk, 16 * tolerance);
  compare("dv", seed, one.dv, expected.dv, 16 * tolerance);
  if (p.bias) compare("dbias", seed, one.dbias, expected.dbias, 16 * tolerance);
  compare("dextra_k", seed, one.dextra_k, expected.dextra_k, 16 * tolerance);
  compare("dextra_v", seed, one.dextra_v, expected.dextra_v, 16 * tolerance);
  const bool same = same_bits(one.out, two.out) && same_bits(one.lse, two.lse) && same_bits(one.dq, two.dq) &&
                    same_bits(one.dk, two.dk) && same_bits(one.dv, two.dv) &&
                    same_bits(one.dbias, two.dbias) && same_bits(one.dextra_k, two.dextra_k) &&
                    same_bits(one.dextra_v, two.dextra_v);
  if (!same) std::printf("seed %u: one and two threads differ\n", seed), ++failures;
}

}  // namespace native_test

int main(int argc, char** argv) {
  const unsigned count = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 20;
  using namespace native_test;
  for (unsigned seed = 0; seed < count; ++seed) {
    check<double, double>(seed, 1e-11);
    check<float, float>(seed, 1e-5);
    check<BFloat16, float>(seed, 1e-2);
    check<Half, float>(seed, 1.5e-3);
  }
  std::printf("%u problems in 4 dtypes, %d failures\n", count, failures);
  return failures != 0;
}
