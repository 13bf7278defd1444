// hash attention, backward, in three passes over the tokens: the gradients of S, z and of the sum of v; those
// of v, of the codes and, but for what sigma adds, of x; that of qk.
//
//   r_i = dout_i / den_i     e_i = -(out_i . dout_i) / den_i     den_i = code_i . z + n offset
//   dS = sum_i code_i r_i^T   dz = sum_i e_i code_i   R = sum_i r_i
//   dcode_i = S r_i + e_i z + dS v_i + dz             dv_i = dS^T code_i + offset (R, or r_i if `self`)
//   T = (dy weight) exp(-d / (2 sigma))               dd = -T / (2 sigma) + sum(T d) / (2 sigma^2 n anchors)
//   dx_i = sum_j dd_ij (-2 anchor_j), and dqk = (dx - x (x . dx)) / |qk|
#include "hash_block.h"

namespace vicinal::VICINAL_ISA {
namespace {

template <class S, class T>
struct HashBackward : HashBlock<S, T> {
  using Base = HashBlock<S, T>;
  using Base::a, Base::anchor, Base::b, Base::begin, Base::code, Base::dp, Base::dvp, Base::end, Base::h,
      Base::kernel, Base::kN, Base::m, Base::values, Base::x;
  const HashBwd& p;
  T *s, *ds;               // S and dS, with the sums of v and r [bits + 1][dvp]
  T *dout, *dvalues;       // r, then dv [kHashBlock][dvp]
  T* columns;              // dout or v [dvp][kHashBlock]
  T *reads, *writes;       // S dout and dS v [bits + 1][kHashBlock]
  T *distance, *gradient;  // d and dd [anchors][kHashBlock]
  T* out;                  // dqk [kHashBlock][dp]
  T inverse_sum[kHashBlock], e[kHashBlock];

  explicit HashBackward(const HashBwd& params) : Base(params.a), p(params) {}

  void carve(cpu::Arena& arena) {
    Base::carve(arena);
    const int64_t rows = a.bits + 1;
    s = arena.take<T>(rows * dvp), ds = arena.take<T>(rows * dvp);
    dout = arena.take<T>(int64_t(kHashBlock) * dvp), dvalues = arena.take<T>(int64_t(kHashBlock) * dvp);
    columns = arena.take<T>(int64_t(dvp) * kHashBlock);
    reads = arena.take<T>(rows * kHashBlock), writes = arena.take<T>(rows * kHashBlock);
    distance = arena.take<T>(int64_t(m) * kHashBlock), gradient = arena.take<T>(int64_t(m) * kHashBlock);
    out = arena.take<T>(int64_t(kHashBlock) * dp);
  }
  int64_t pair() const { return b * a.heads + h; }
  int32_t tokens_at(int64_t first) const {
    return static_cast<int32_t>(end - first < kHashBlock ? end - first : kHashBlock);
  }

  // code, 1 / den, e, S dout (in `reads`) and r (in `dout`) of the block.
  void read_block(int64_t first, int32_t count, const HashState<T>& state) {
    this->decode(p.codes + pair() * a.n + first, count);
    this->inverse_sums(state.z, inverse_sum);
    Base::pack_rows(p.dout, b, first, count, h, a.dim_v, T(1), dout);
    Base::pack_columns(p.dout, b, first, count, h, a.dim_v, columns);
    gemm_rows(Gemm<T>{s, dvp, columns, kHashBlock, nullptr, 0, reads, kHashBlock, nullptr}, a.bits + 1,
              a.dim_v, Base::kSteps);
    if (a.self) own_values(first, count);
    const T* constant = reads + int64_t(a.bits) * kHashBlock;
    for (int32_t t = 0; t < kHashBlock; t += kN) {
      Vec<T> sum = load(constant + t) * T(a.offset);
      for (int32_t i = 0; i < a.bits; ++i) {
        const int64_t at = int64_t(i) * kHashBlock + t;
        sum += load(code + at) * load(reads + at);
      }
      const Vec<T> inverse = load(inverse_sum + t);
      store(e + t, -sum * inverse * inverse);
    }
    for (int32_t t = 0; t < count; ++t) {
      for (int32_t c = 0; c < dvp; c += kN) {
        T* at = dout + int64_t(t) * dvp + c;
        store(at, load(at) * inverse_sum[t]);
      }
    }
  }
  // The last row of `reads` becomes v_i . dout_i.
  void own_values(int64_t first, int32_t count) {
    Base::pack_rows(a.v, b, first, count, h, a.dim_v, T(1), values);
    for (int32_t t = 0; t < count; ++t) {
      Vec<T> sum = {};
      for (int32_t c = 0; c < dvp; c += kN)
        sum += load(values + int64_t(t) * dvp + c) * load(dout + int64_t(t) * dvp + c);
      reads[int64_t(a.bits) * kHashBlock + t] = sum_lanes<T>(sum);
    }
  }

  // Partial of a chunk: dS and R [bits + 1][dvp], dz [bits].
  void sums(T* partial) {
    const HashState<T> state(a, p.state, pair());
    this->pad_rows(state.s, a.bits + 1, T(1), s);
    for (int64_t first = begin; first < end; first += kHashBlock) {
      const int32_t count = tokens_at(first);
      read_block(first, count, state);
      this->add_outer(dout, dvp, count, partial);
      this->add_weighted(e, count, partial + int64_t(a.bits + 1) * dvp);
    }
  }

  // dv, and dx but for sigma's part -> scratch [dp][kHashBlock] per block. Returns the sum of T d. `total`:
  // the sum of the partials.
  T gradients(const T* total, T* scratch) {
    const HashState<T> state(a, p.state, pair());
    this->pad_rows(state.s, a.bits + 1, T(1), s);
    for (int32_t c = 0; c < (a.bits + 1) * dvp; c += kN)
      store(ds + c, load(total + c) * (c < a.bits * dvp ? T(1) : T(a.offset)));
    const T* dz = total + int64_t(a.bits + 1) * dvp;
    T sum = 0;
    for (int64_t first = begin; first < end; first += kHashBlock, scratch += int64_t(dp) * kHashBlock) {
      const int32_t count = tokens_at(first);
      read_block(first, count, state);
      write_values(first, count);
      Base::pack_columns(a.v, b, first, count, h, a.dim_v, columns);
      gemm_rows(Gemm<T>{ds, dvp, columns, kHashBlock, nullptr, 0, writes, kHashBlock, nullptr}, a.bits,
                a.dim_v, Base::kSteps);
      code_gradients(p.codes + pair() * a.n + first, count, state.z, dz);
      this->unit_vectors(first, count);
      this->kernels(*state.sigma, distance);
      sum += distance_gradients(*state.sigma);
      gemm_columns(Gemm<T>{anchor, a.dim, gradient, kHashBlock, nullptr, 0, scratch, kHashBlock, nullptr},
                   a.dim, m, Base::kSteps);
    }
    return sum;
  }
  void write_values(int64_t first, int32_t count) {
    if (a.self) {
      for (int32_t c = 0; c < count * dvp; c += kN) store(dout + c, load(dout + c) * T(a.offset));
    }
    gemm_columns(Gemm<T>{code, kHashBlock, ds, dvp, a.self ? dout : nullptr, dvp, dvalues, dvp, nullptr},
                 count, a.self ? a.bits : a.bits + 1, dvp / kN);
    Base::write_rows(dvalues, dvp, nullptr, count, p.dv, b, first, h, a.dim_v);
  }
  // dy in `writes`: the gradient of the codes where |y| < 1.
  void code_gradients(const int32_t* words, int32_t count, const T* z, const T* dz) {
    int32_t padded[kHashBlock] = {};
    __builtin_memcpy(padded, words, sizeof(int32_t) * static_cast<size_t>(count));
    for (int32_t t = 0; t < kHashBlock; t += kN) {
      const Ints<T> word = Base::load_codes(padded + t);
      const Vec<T> inverse = load(inverse_sum + t), et = load(e + t);
      for (int32_t i = 0; i < a.bits; ++i) {
        const int64_t at = int64_t(i) * kHashBlock + t;
        const Vec<T> g = load(reads + at) * inverse + et * z[i] + load(writes + at) + dz[i];
        store(writes + at, (word >> (kHashBits + i) & 1) != 0 ? g : Vec<T>{});
      }
    }
  }
  // dd in `gradient`, without sigma's part; returns the sum of T d.
  T distance_gradients(T sigma) {
    gemm_columns(Gemm<T>{this->weight(), m, writes, kHashBlock, nullptr, 0, gradient, kHashBlock, nullptr}, m,
                 a.bits, Base::kSteps);
    const T factor = T(-0.5) / sigma;
    Vec<T> sum = {};
    for (int64_t i = 0; i < int64_t(m) * kHashBlock; i += kN) {
      const Vec<T> slope = load(gradient + i) * load(kernel + i);
      sum += slope * load(distance + i);
      store(gradient + i, slope * factor);
    }
    return sum_lanes<T>(sum);
  }

  // dqk of a chunk. `all`: the sum of T d over the sample and head.
  void finish(T all, T* scratch) {
    const T sigma = *HashState<T>(a, p.state, pair()).sigma;
    const T each = all / (2 * sigma * sigma * T(a.n) * T(m));
    for (int64_t first = begin; first < end; first += kHashBlock, scratch += int64_t(dp) * kHashBlock) {
      const int32_t count = tokens_at(first);
      this->unit_vectors(first, count);
      for (int32_t c = 0; c < a.dim; ++c) {
        T constant = 0;
        for (int32_t j = 0; j < m; ++j) constant += anchor[int64_t(j) * a.dim + c];
        for (int32_t t = 0; t < kHashBlock; t += kN) {
          T* at = scratch + int64_t(c) * kHashBlock + t;
          store(at, load(at) + constant * each);
        }
      }
      for (int32_t t = 0; t < kHashBlock; t += kN) {
        Vec<T> dot = {};
        for (int32_t c = 0; c < a.dim; ++c)
          dot += load(x + int64_t(c) * kHashBlock + t) * load(scratch + int64_t(c) * kHashBlock + t);
        for (int32_t c = 0; c < a.dim; ++c) {
          T* at = scratch + int64_t(c) * kHashBlock + t;
          store(at, (load(at) - load(x + int64_t(c) * kHashBlock + t) * dot) * load(this->inverse + t));
        }
      }
      for (int32_t t0 = 0; t0 < kHashBlock; t0 += kN) {
        for (int32_t c0 = 0; c0 < dp; c0 += kN) {
          Vec<T> r[kN];
          for (int32_t i = 0; i < kN; ++i)
            r[i] = c0 + i < a.dim ? load(scratch + int64_t(c0 + i) * kHashBlock + t0) : Vec<T>{};
          transpose<T>(r);
          for (int32_t i = 0; i < kN; ++i) store(out + int64_t(t0 + i) * dp + c0, r[i]);
        }
      }
      Base::write_rows(out, dp, nullptr, count, p.dqk, b, first, h, a.dim);
    }
  }
};

template <class S, class T>
void run(const HashBwd& p, int threads) {
  cpu::Arena counter(nullptr);
  HashBackward<S, T> counted(p);
  counted.carve(counter);
  const Hash& a = p.a;
  const HashTasks tasks(a);
  const int64_t pairs = a.batch * a.heads, stride = int64_t(a.bits + 1) * counted.dvp + a.bits;
  T* partials = allocate_partials<T>(tasks.count * stride);
  T* totals = allocate_partials<T>(pairs * stride);
  T* scratch = allocate_partials<T>(tasks.count * kHashChunk * counted.dp);
  T* slopes = allocate_partials<T>(tasks.count);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    HashBackward<S, T> w(p);
    cpu::Arena arena(cpu::thread_scratch(counter.used()));
    w.carve(arena);
    w.set_ones();
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks.count; ++task) {
      w.set_task(tasks, task);
      w.sums(partials + task * stride);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs * stride; ++i) {
      const T* first = partials + i / stride * tasks.chunks * stride + i % stride;
      totals[i] = sum_chunks(first, tasks.chunks, stride);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks.count; ++task) {
      w.set_task(tasks, task);
      slopes[task] = w.gradients(totals + w.pair() * stride, scratch + task * kHashChunk * counted.dp);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks.count; ++task) {
      w.set_task(tasks, task);
      const T all = sum_chunks(slopes + w.pair() * tasks.chunks, tasks.chunks, 1);
      w.finish(all, scratch + task * kHashChunk * counted.dp);
    }
  }
  __builtin_free(partials), __builtin_free(totals), __builtin_free(scratch), __builtin_free(slopes);
}

}  // namespace

void hash_bwd(const HashBwd& p, int threads) {
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
