// What the forward and the backward of hash attention share: blocks of tokens whose lanes are the tokens.
//
// A task is a chunk of tokens of one sample and head. Sums over tokens go through one partial per chunk,
// added in the order of the chunks, so that they do not depend on the number of threads.
#pragma once
#include "gemm.h"
#include "hash.h"
#include "memory.h"

namespace vicinal::VICINAL_ISA {

constexpr int kHashBlock = 128;  // tokens at a time
constexpr int kHashChunk = 512;  // tokens of a task

inline void square_roots(const float* x, float* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = __builtin_sqrtf(x[i]);
}
inline void square_roots(const double* x, double* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = __builtin_sqrt(x[i]);
}

// Task = (sample * heads + head) * chunks + chunk.
struct HashTasks {
  int64_t chunks, count;
  explicit HashTasks(const Hash& a)
      : chunks((a.n + kHashChunk - 1) / kHashChunk), count(a.batch * a.heads * chunks) {}
};

// Of a sample and head. The sum of v is the last row of S: that of a code whose sign is always +1.
template <class T>
struct HashState {
  T *s, *z, *sigma;
  HashState(const Hash& a, const void* state, int64_t pair) {
    s = static_cast<T*>(const_cast<void*>(state)) + pair * a.state_size();
    z = s + int64_t(a.bits + 1) * a.dim_v, sigma = z + a.bits;
  }
};

template <class S, class T>
struct HashBlock {
  static constexpr int kN = kLanes<T>, kSteps = kHashBlock / kN;

  const Hash& a;
  const int32_t m, dp, dvp;  // anchors; dims rounded up to whole vectors
  T* x;                      // [dp][kHashBlock], unit vectors
  T* kernel;                 // exp(-d / (2 sigma)) [m][kHashBlock]
  T* code;                   // +1, -1 [bits + 1][kHashBlock]; the last row is all +1
  T* values;                 // [kHashBlock][dvp]
  T* anchor;                 // -2 anchor [m][dim]
  T* base;                   // 1 + |anchor|^2 [m]
  T inverse[kHashBlock];     // 1 / |qk|, 0 for a zero vector
  // The task at work.
  int64_t b, h, begin, end;
  int64_t held = -1;  // head whose anchors are there

  explicit HashBlock(const Hash& hash)
      : a(hash), m(hash.anchors), dp(round_up(hash.dim, kN)), dvp(round_up(hash.dim_v, kN)) {}

  void carve(cpu::Arena& arena) {
    x = arena.take<T>(int64_t(dp) * kHashBlock), kernel = arena.take<T>(int64_t(m) * kHashBlock);
    code = arena.take<T>(int64_t(a.bits + 1) * kHashBlock), values = arena.take<T>(int64_t(kHashBlock) * dvp);
    anchor = arena.take<T>(int64_t(m) * a.dim), base = arena.take<T>(m);
  }
  void set_ones() {  // after carve, when the memory is there
    for (int32_t t = 0; t < kHashBlock; ++t) code[int64_t(a.bits) * kHashBlock + t] = 1;
  }
  const T* weight() const { return static_cast<const T*>(a.weight) + h * a.bits * m; }
  const T* mean() const { return static_cast<const T*>(a.mean) + h * m; }
  const T* anchors() const { return static_cast<const T*>(a.anchor) + h * m * a.dim; }

  void set_task(const HashTasks& tasks, int64_t task) {
    const int64_t pair = task / tasks.chunks;
    b = pair / a.heads, h = pair % a.heads, begin = task % tasks.chunks * kHashChunk;
    end = begin + kHashChunk < a.n ? begin + kHashChunk : a.n;
    if (held == h) return;
    held = h;
    for (int32_t j = 0; j < m; ++j) {
      const T* from = anchors() + int64_t(j) * a.dim;
      T sum = 1;
      for (int32_t c = 0; c < a.dim; ++c)
        anchor[int64_t(j) * a.dim + c] = -2 * from[c], sum += from[c] * from[c];
      base[j] = sum;
    }
  }

  // Rows [count][dim] -> columns [dims][kHashBlock]; what is beyond count is 0.
  static void pack_columns(const Rows& t, int64_t b, int64_t first, int32_t count, int64_t h, int32_t dim,
                           T* to) {
    for (int32_t t0 = 0; t0 < kHashBlock; t0 += kN) {
      for (int32_t c0 = 0; c0 < dim; c0 += kN) {
        Vec<T> r[kN];
#pragma GCC unroll 16
        for (int32_t i = 0; i < kN; ++i) {
          if (t0 + i >= count) {
            r[i] = Vec<T>{};
            continue;
          }
          const S* from = row_of<S>(t, b, first + t0 + i, h) + c0;
          r[i] = c0 + kN <= dim ? load_as(from) : load_part<T>(from, dim - c0);
        }
        transpose<T>(r);
#pragma GCC unroll 16
        for (int32_t i = 0; i < kN; ++i) store(to + int64_t(c0 + i) * kHashBlock + t0, r[i]);
      }
    }
  }
  // Rows [count][dim] -> rows [count][padded], times factor.
  static void pack_rows(const Rows& t, int64_t b, int64_t first, int32_t count, int64_t h, int32_t dim,
                        T factor, T* to) {
    const int32_t padded = round_up(dim, kN);
    for (int32_t i = 0; i < count; ++i, to += padded) {
      const S* from = row_of<S>(t, b, first + i, h);
      for (int32_t c = 0; c < dim; c += kN)
        store(to + c, (c + kN <= dim ? load_as(from + c) : load_part<T>(from + c, dim - c)) * factor);
    }
  }

  // x and inverse of the block.
  void unit_vectors(int64_t first, int32_t count) {
    pack_columns(a.qk, b, first, count, h, a.dim, x);
    T squares[kHashBlock];
    for (int32_t t = 0; t < kHashBlock; t += kN) {
      Vec<T> sum = {};
      for (int32_t c = 0; c < a.dim; ++c) {
        const Vec<T> y = load(x + int64_t(c) * kHashBlock + t);
        sum += y * y;
      }
      store(squares + t, sum);
    }
    square_roots(squares, squares, kHashBlock);
    for (int32_t t = 0; t < kHashBlock; t += kN) {
      const Vec<T> norm = load(squares + t), i = norm > Vec<T>{} ? T(1) / norm : Vec<T>{};
      store(inverse + t, i);
      for (int32_t c = 0; c < a.dim; ++c) {
        T* y = x + int64_t(c) * kHashBlock + t;
        store(y, load(y) * i);
      }
    }
  }
  // kernel of the block, from x; `distance` [m][kHashBlock] gets d if it is not null.
  void kernels(T sigma, T* distance) {
    gemm_rows(Gemm<T>{anchor, a.dim, x, kHashBlock, nullptr, 0, kernel, kHashBlock, nullptr}, m, a.dim,
              kSteps);
    const T factor = T(-1.44269504088896340736) / (2 * sigma);
    for (int32_t j = 0; j < m; ++j) {
      for (int32_t t = 0; t < kHashBlock; t += kN) {
        T* at = kernel + int64_t(j) * kHashBlock + t;
        const Vec<T> d = load(at) + base[j];
        if (distance) store(distance + int64_t(j) * kHashBlock + t, d);
        store(at, exp2(d * factor));
      }
    }
  }

  static Ints<T> load_codes(const int32_t* from) {
    Ints<T> r = {};
    for (int i = 0; i < kN; ++i) r[i] = from[i];
    return r;
  }
  // +1 and -1 of `count` words; what is beyond them is -1.
  void decode(const int32_t* words, int32_t count) {
    int32_t padded[kHashBlock] = {};
    __builtin_memcpy(padded, words, sizeof(int32_t) * static_cast<size_t>(count));
    for (int32_t t = 0; t < kHashBlock; t += kN) {
      const Ints<T> word = load_codes(padded + t);
      for (int32_t i = 0; i < a.bits; ++i) {
        const Vec<T> one = splat(T(1));
        store(code + int64_t(i) * kHashBlock + t, (word >> i & 1) != 0 ? one : -one);
      }
    }
  }
  // sum_t code[i][t] * row_t for rows [count][width], added to sum [bits + 1][width].
  void add_outer(const T* rows, int32_t width, int32_t count, T* sum) const {
    gemm_rows(Gemm<T>{code, kHashBlock, rows, width, sum, width, sum, width, nullptr}, a.bits + 1, count,
              width / kN);
  }
  // sum_t code[i][t] * x[t], or of the codes alone, added to sum [bits].
  void add_weighted(const T* x, int32_t count, T* sum) const {
    for (int32_t i = 0; i < a.bits; ++i) {
      const T* row = code + int64_t(i) * kHashBlock;
      Vec<T> total = {};
      int32_t t = 0;
      for (; t + kN <= count; t += kN) total += x ? load(row + t) * load(x + t) : load(row + t);
      T rest = sum_lanes<T>(total);
      for (; t < count; ++t) rest += x ? row[t] * x[t] : row[t];
      sum[i] += rest;
    }
  }
  // Rows [rows][dim_v] -> [rows][dvp], times factor.
  void pad_rows(const T* from, int32_t rows, T factor, T* to) const {
    for (int32_t i = 0; i < rows; ++i, from += a.dim_v, to += dvp) {
      for (int32_t c = 0; c < dvp; ++c) to[c] = c < a.dim_v ? from[c] * factor : T(0);
    }
  }
  // Rows [count][padded width] times factor_t -> rows of t.
  static void write_rows(const T* from, int32_t padded, const T* factor, int32_t count, const Rows& t,
                         int64_t b, int64_t first, int64_t h, int32_t dim) {
    for (int32_t i = 0; i < count; ++i, from += padded) {
      S* to = row_of<S>(t, b, first + i, h);
      const T by = factor ? factor[i] : T(1);
      int32_t c = 0;
      for (; c + kN <= dim; c += kN) store_as(to + c, load(from + c) * by);
      if (c < dim) store_part<T>(to + c, load(from + c) * by, dim - c);
    }
  }
  // 1 / (code . z + n offset) per token.
  void inverse_sums(const T* z, T* to) const {
    for (int32_t t = 0; t < kHashBlock; t += kN) {
      Vec<T> sum = splat(T(a.offset * double(a.n)));
      for (int32_t i = 0; i < a.bits; ++i) sum += load(code + int64_t(i) * kHashBlock + t) * z[i];
      store(to + t, T(1) / sum);
    }
  }
};

// 2^i in every lane.
template <class T>
inline Ints<T> bit_mask(int i) {
  Ints<T> r = {};
  for (int lane = 0; lane < kLanes<T>; ++lane) r[lane] = static_cast<int32_t>(1u << i);
  return r;
}

// The sum of one number of every chunk, in their order.
template <class T>
inline T sum_chunks(const T* from, int64_t chunks, int64_t stride) {
  T sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += from[chunk * stride];
  return sum;
}

template <class T>
inline T* allocate_partials(int64_t n) {
  T* data = static_cast<T*>(__builtin_calloc(static_cast<size_t>(n + 1), sizeof(T)));
  if (!data) __builtin_abort();
  return data;
}

}  // namespace vicinal::VICINAL_ISA
