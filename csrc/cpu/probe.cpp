// The limit that benchmarks measure kernels against: float32 multiply-adds per second out of registers.
//
// Each thread runs 12 or 16 independent chains of vector multiply-adds: enough for a latency of 4 at two a
// cycle, and few enough for the registers. The factor 1 and the addend 0 come from memory, so the compiler
// keeps every operation.
#include <chrono>

namespace vicinal::VICINAL_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kChains = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kChains = 12;
#else
constexpr int kLanes = 4, kChains = 12;
#endif
constexpr int kSteps = 512;

typedef float Vec __attribute__((vector_size(4 * kLanes)));

volatile float factor_source = 1.0f, addend_source = 0.0f, sink;

// Runs until `seconds` have passed; multiply-adds per nanosecond times two are GFLOP/s.
double one_thread(double seconds) {
  using Clock = std::chrono::steady_clock;
  const Vec factor = Vec{} + factor_source, addend = Vec{} + addend_source;
  Vec chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = Vec{} + float(i);
  const Clock::time_point start = Clock::now();
  double elapsed = 0.0, flops = 0.0;
  while (elapsed < seconds) {
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * factor + addend;
    }
    flops += 2.0 * kSteps * kChains * kLanes;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  }
  Vec total{};
  for (int i = 0; i < kChains; ++i) total += chain[i];
  sink = total[0];
  return flops / elapsed * 1e-9;
}

}  // namespace

double fma_probe(double seconds, int threads) {
  double gflops = 0.0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : gflops)
  for (int thread = 0; thread < threads; ++thread) gflops += one_thread(seconds);
  return gflops;
}

}  // namespace vicinal::VICINAL_ISA
