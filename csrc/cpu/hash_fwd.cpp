// hash attention, forward, in three passes over the tokens: sigma; codes and their sums; the results.
//
// sigma needs no distances: the mean of d is 1 + mean |anchor|^2 - 2 (mean x) . (mean anchor).
//
// Also known: S and code . S need no multiplication, since codes are signs, and with two tables of 256
// entries a result costs two look-ups. With lanes of multiply-adds that is no gain here: of the forward at 8
// x 3136 tokens, dimension 32, both products together are a fifth, and the tables of a head (2 x 256 x 32
// numbers) do not fit the first-level cache.
#include "hash_block.h"

namespace vicinal::VICINAL_ISA {
namespace {

template <class S, class T>
struct HashForward : HashBlock<S, T> {
  using Base = HashBlock<S, T>;
  using Base::a, Base::b, Base::begin, Base::code, Base::dvp, Base::end, Base::h, Base::kernel, Base::kN,
      Base::m, Base::values, Base::x;
  const HashFwd& p;
  T* lane_sums;        // [dim][a vector]
  T *s, *shift, *out;  // padded S [bits + 1][dvp], offset v [kHashBlock][dvp], results [kHashBlock][dvp]

  explicit HashForward(const HashFwd& params) : Base(params.a), p(params) {}

  void carve(cpu::Arena& arena) {
    Base::carve(arena);
    s = arena.take<T>(int64_t(a.bits + 1) * dvp), shift = arena.take<T>(int64_t(kHashBlock) * dvp);
    out = arena.take<T>(int64_t(kHashBlock) * dvp), lane_sums = arena.take<T>(int64_t(a.dim) * kN);
  }

  // Partial of a chunk: sum of x [dim].
  void sum_units(T* partial) {
    for (int32_t c = 0; c < a.dim; ++c) store(lane_sums + c * kN, Vec<T>{});
    for (int64_t first = begin; first < end; first += kHashBlock) {
      const int32_t count = static_cast<int32_t>(end - first < kHashBlock ? end - first : kHashBlock);
      this->unit_vectors(first, count);
      for (int32_t c = 0; c < a.dim; ++c) {
        Vec<T> sum = load(lane_sums + c * kN);
        for (int32_t t = 0; t < kHashBlock; t += kN) sum += load(x + int64_t(c) * kHashBlock + t);
        store(lane_sums + c * kN, sum);
      }
    }
    for (int32_t c = 0; c < a.dim; ++c) partial[c] = sum_lanes<T>(load(lane_sums + c * kN));
  }
  T sigma_of(const T* partials, int64_t chunks) const {
    T dot = 0, base = 0;
    for (int32_t c = 0; c < a.dim; ++c) {
      T sum = 0, of_anchors = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partials[chunk * a.dim + c];
      for (int32_t j = 0; j < m; ++j) of_anchors += this->anchor[int64_t(j) * a.dim + c];  // times -2
      dot += sum * of_anchors;
    }
    for (int32_t j = 0; j < m; ++j) base += this->base[j];
    return (base + dot / T(a.n)) / T(m);
  }

  // Codes of a chunk, and its partial: S and the sum of v [bits + 1][dvp], z [bits].
  void sums(T sigma, T* partial) {
    int32_t* words = p.codes + (b * a.heads + h) * a.n;
    for (int64_t first = begin; first < end; first += kHashBlock) {
      const int32_t count = static_cast<int32_t>(end - first < kHashBlock ? end - first : kHashBlock);
      this->unit_vectors(first, count);
      this->kernels(sigma, nullptr);
      encode(words + first, count);
      Base::pack_rows(a.v, b, first, count, h, a.dim_v, T(1), values);
      this->add_outer(values, dvp, count, partial);
      this->add_weighted(nullptr, count, partial + int64_t(a.bits + 1) * dvp);
    }
  }
  // kernel -> code and words.
  void encode(int32_t* words, int32_t count) {
    for (int32_t j = 0; j < m; ++j) {
      const T shift_j = this->mean()[j];
      for (int32_t t = 0; t < kHashBlock; t += kN) {
        T* at = kernel + int64_t(j) * kHashBlock + t;
        store(at, load(at) - shift_j);
      }
    }
    gemm_rows(Gemm<T>{this->weight(), m, kernel, kHashBlock, nullptr, 0, code, kHashBlock, nullptr}, a.bits,
              m, Base::kSteps);
    for (int32_t t = 0; t < kHashBlock; t += kN) {
      Ints<T> word = {}, low = bit_mask<T>(0), high = bit_mask<T>(kHashBits);
      for (int32_t i = 0; i < a.bits; ++i) {
        T* at = code + int64_t(i) * kHashBlock + t;
        const Vec<T> y = load(at), one = splat(T(1));
        const Ints<T> set = y >= Vec<T>{}, near = (y < one) & (y > -one);
        word |= (set & low) | (near & high);
        low += low, high += high;
        store(at, y >= Vec<T>{} ? one : -one);
      }
      for (int32_t i = 0; i < kN && t + i < count; ++i) words[t + i] = static_cast<int32_t>(word[i]);
    }
  }

  // The state of a sample and head, from the partials of its chunks.
  void add_partials(const T* partials, int64_t chunks, int64_t stride, HashState<T> state) const {
    for (int32_t i = 0; i <= a.bits; ++i) {
      for (int32_t c = 0; c < a.dim_v; ++c)
        state.s[int64_t(i) * a.dim_v + c] = sum_chunks(partials + int64_t(i) * dvp + c, chunks, stride);
    }
    for (int32_t i = 0; i < a.bits; ++i)
      state.z[i] = sum_chunks(partials + int64_t(a.bits + 1) * dvp + i, chunks, stride);
  }

  void results(const HashState<T>& state) {
    this->pad_rows(state.s, a.bits, T(1), s);
    this->pad_rows(state.s + int64_t(a.bits) * a.dim_v, 1, T(a.offset), s + int64_t(a.bits) * dvp);
    const int32_t* words = p.codes + (b * a.heads + h) * a.n;
    T factor[kHashBlock];
    for (int64_t first = begin; first < end; first += kHashBlock) {
      const int32_t count = static_cast<int32_t>(end - first < kHashBlock ? end - first : kHashBlock);
      this->decode(words + first, count);
      this->inverse_sums(state.z, factor);
      if (a.self) Base::pack_rows(a.v, b, first, count, h, a.dim_v, T(a.offset), shift);
      gemm_columns(Gemm<T>{code, kHashBlock, s, dvp, a.self ? shift : nullptr, dvp, out, dvp, nullptr}, count,
                   a.self ? a.bits : a.bits + 1, dvp / kN);
      Base::write_rows(out, dvp, factor, count, p.out, b, first, h, a.dim_v);
    }
  }
};

template <class S, class T>
void run(const HashFwd& p, int threads) {
  cpu::Arena counter(nullptr);
  HashForward<S, T> counted(p);
  counted.carve(counter);
  const Hash& a = p.a;
  const HashTasks tasks(a);
  const int64_t stride = int64_t(a.bits + 1) * counted.dvp + a.bits;
  T* units = allocate_partials<T>(tasks.count * a.dim);
  T* partials = allocate_partials<T>(tasks.count * stride);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    HashForward<S, T> w(p);
    cpu::Arena arena(cpu::thread_scratch(counter.used()));
    w.carve(arena);
    w.set_ones();
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks.count; ++task) {
      w.set_task(tasks, task);
      w.sum_units(units + task * a.dim);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks.count; ++task) {
      w.set_task(tasks, task);
      const int64_t pair = task / tasks.chunks;
      const T sigma = w.sigma_of(units + pair * tasks.chunks * a.dim, tasks.chunks);
      if (w.begin == 0) *HashState<T>(a, p.state, pair).sigma = sigma;
      w.sums(sigma, partials + task * stride);
    }
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < a.batch * a.heads; ++pair)
      w.add_partials(partials + pair * tasks.chunks * stride, tasks.chunks, stride,
                     HashState<T>(a, p.state, pair));
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks.count; ++task) {
      w.set_task(tasks, task);
      w.results(HashState<T>(a, p.state, task / tasks.chunks));
    }
  }
  __builtin_free(units), __builtin_free(partials);
}

}  // namespace

void hash_fwd(const HashFwd& p, int threads) {
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
