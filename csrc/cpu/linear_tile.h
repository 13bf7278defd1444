// Tiles: some tokens of one head as rows of T, zero to the right of their channels, between any memory order
// and the products of gemm.h. And what acts on single rows of them.
#pragma once
#include "gemm.h"
#include "linear.h"
#include "memory.h"

namespace vicinal::VICINAL_ISA {

template <class S>
S* element(const Strided& x, int64_t b, int64_t n, int64_t h) {
  return static_cast<S*>(x.data) + b * x.stride_b + n * x.stride_n + h * x.stride_h;
}

// Tokens n0 .. n0 + n - 1 of one head of a tensor.
template <class S>
struct Place {
  S* data;
  int64_t stride_n, stride_d;
  int32_t n, dim;

  Place(const Strided& x, int64_t b, int64_t n0, int32_t count, int64_t h, int32_t width)
      : data(element<S>(x, b, n0, h)), stride_n(x.stride_n), stride_d(x.stride_d), n(count), dim(width) {}
  // Channels as rows of tokens.
  Place transposed() const {
    Place x = *this;
    x.stride_n = stride_d, x.stride_d = stride_n, x.n = dim, x.dim = n;
    return x;
  }
  bool by_rows() const { return stride_d == 1 || dim == 1; }
  bool by_columns() const { return stride_n == 1 || n == 1; }
};

// Rows have room for round_up(n, lanes) tokens and `stride` channels, a multiple of the lanes.
template <class S, class T>
void pack_tile(const Place<S>& x, T* to, int stride) {
  constexpr int kN = kLanes<T>;
  if (x.by_rows()) {
    for (int32_t i = 0; i < x.n; ++i) {
      const S* row = x.data + i * x.stride_n;
      T* out = to + int64_t(i) * stride;
      int d = 0;
      for (; d + kN <= x.dim; d += kN) store(out + d, load_as(row + d));
      if (d < x.dim) store(out + d, load_part<T>(row + d, x.dim - d)), d += kN;
      for (; d < stride; d += kN) store(out + d, Vec<T>{});
    }
    return;
  }
  for (int32_t i0 = 0; i0 < x.n; i0 += kN) {
    const int32_t high = x.n - i0 < kN ? x.n - i0 : kN;
    for (int d0 = 0; d0 < stride; d0 += kN) {
      Vec<T> r[kN];
      if (x.by_columns()) {
#pragma GCC unroll 16
        for (int u = 0; u < kN; ++u) {
          const S* column = x.data + i0 + (d0 + u) * x.stride_d;
          r[u] = d0 + u >= x.dim ? Vec<T>{} : high == kN ? load_as(column) : load_part<T>(column, high);
        }
        transpose<T>(r);
      } else {
        for (int u = 0; u < kN; ++u) {
          r[u] = Vec<T>{};
          for (int v = 0; v < kN && u < high && d0 + v < x.dim; ++v) {
            r[u][v] = static_cast<T>(widen(x.data[(i0 + u) * x.stride_n + (d0 + v) * x.stride_d]));
          }
        }
      }
#pragma GCC unroll 16
      for (int u = 0; u < kN; ++u) store(to + int64_t(i0 + u) * stride + d0, r[u]);
    }
  }
}

// Rows of T, each times its factor (null: 1), to where they belong.
template <class S, class T>
void unpack_tile(const T* from, int stride, const T* factors, const Place<S>& x) {
  constexpr int kN = kLanes<T>;
  if (x.by_rows()) {
    for (int32_t i = 0; i < x.n; ++i) {
      S* row = x.data + i * x.stride_n;
      const T* in = from + int64_t(i) * stride;
      const T f = factors ? factors[i] : T(1);
      int d = 0;
      for (; d + kN <= x.dim; d += kN) store_as(row + d, load(in + d) * f);
      if (d < x.dim) store_part<T>(row + d, load(in + d) * f, x.dim - d);
    }
    return;
  }
  for (int32_t i0 = 0; i0 < x.n; i0 += kN) {
    const int32_t high = x.n - i0 < kN ? x.n - i0 : kN;
    for (int d0 = 0; d0 < x.dim; d0 += kN) {
      Vec<T> r[kN];
#pragma GCC unroll 16
      for (int u = 0; u < kN; ++u) {
        r[u] = u >= high ? Vec<T>{}
                         : load(from + int64_t(i0 + u) * stride + d0) * (factors ? factors[i0 + u] : T(1));
      }
      if (!x.by_columns()) {
        for (int u = 0; u < high; ++u) {
          for (int v = 0; v < kN && d0 + v < x.dim; ++v) {
            narrow(r[u][v], x.data + (i0 + u) * x.stride_n + (d0 + v) * x.stride_d);
          }
        }
        continue;
      }
      transpose<T>(r);
#pragma GCC unroll 16
      for (int u = 0; u < kN; ++u) {
        S* column = x.data + i0 + (d0 + u) * x.stride_d;
        if (d0 + u >= x.dim) continue;
        if (high == kN) {
          store_as(column, r[u]);
        } else {
          store_part<T>(column, r[u], high);
        }
      }
    }
  }
}

// to[d][i] = from[i][d] for i < n, d < dim; both have room for whole vectors.
template <class T>
void transpose_tile(const T* from, int stride, int n, int dim, T* to, int to_stride) {
  constexpr int kN = kLanes<T>;
  for (int i0 = 0; i0 < n; i0 += kN) {
    for (int d0 = 0; d0 < dim; d0 += kN) {
      Vec<T> r[kN];
#pragma GCC unroll 16
      for (int u = 0; u < kN; ++u) r[u] = i0 + u < n ? load(from + int64_t(i0 + u) * stride + d0) : Vec<T>{};
      transpose<T>(r);
#pragma GCC unroll 16
      for (int u = 0; u < kN; ++u) {
        if (d0 + u < dim) store(to + int64_t(d0 + u) * to_stride + i0, r[u]);
      }
    }
  }
}

// out[i] = a_i . b for the rows of a; b_stride 0: the same b for all of them. out has room for whole vectors.
template <class T>
void row_dots(const T* a, int a_stride, const T* b, int b_stride, int n, int dim, T* out) {
  constexpr int kN = kLanes<T>;
  for (int i0 = 0; i0 < n; i0 += kN) {
    Vec<T> r[kN];
#pragma GCC unroll 16
    for (int u = 0; u < kN; ++u) r[u] = Vec<T>{};
    if (i0 + kN <= n) {
      for (int d = 0; d < dim; d += kN) {
#pragma GCC unroll 16
        for (int u = 0; u < kN; ++u) {
          r[u] += load(a + int64_t(i0 + u) * a_stride + d) * load(b + int64_t(i0 + u) * b_stride + d);
        }
      }
    } else {
      for (int u = 0; u < n - i0; ++u) {
        for (int d = 0; d < dim; d += kN) {
          r[u] += load(a + int64_t(i0 + u) * a_stride + d) * load(b + int64_t(i0 + u) * b_stride + d);
        }
      }
    }
    store(out + i0, sum_each<T>(r));
  }
}

// to += sum over rows of factor_i (null: 1) times row i.
template <class T>
void add_rows(const T* a, int stride, const T* factors, int n, int dim, T* to) {
  constexpr int kN = kLanes<T>;
  for (int d = 0; d < dim; d += kN) {
    Vec<T> even = load(to + d), odd = {};
    int i = 0;
    for (; i + 2 <= n; i += 2) {
      even += load(a + int64_t(i) * stride + d) * (factors ? factors[i] : T(1));
      odd += load(a + int64_t(i + 1) * stride + d) * (factors ? factors[i + 1] : T(1));
    }
    if (i < n) even += load(a + int64_t(i) * stride + d) * (factors ? factors[i] : T(1));
    store(to + d, even + odd);
  }
}

// Row i += factor_i (null: 1) times x.
template <class T>
void add_to_rows(T* a, int stride, const T* factors, const T* x, int n, int dim) {
  for (int i = 0; i < n; ++i) {
    const T f = factors ? factors[i] : T(1);
    for (int d = 0; d < dim; d += kLanes<T>) {
      T* at = a + int64_t(i) * stride + d;
      store(at, load(at) + load(x + d) * f);
    }
  }
}

template <class T>
void scale_rows(T* a, int stride, const T* factors, int n, int dim) {
  for (int i = 0; i < n; ++i) {
    for (int d = 0; d < dim; d += kLanes<T>) {
      T* at = a + int64_t(i) * stride + d;
      store(at, load(at) * factors[i]);
    }
  }
}

// a += b or a *= b, element by element; a whole number of vectors.
template <class T>
void add_into(T* a, const T* b, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes<T>) store(a + i, load(a + i) + load(b + i));
}
template <class T>
void multiply_into(T* a, const T* b, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes<T>) store(a + i, load(a + i) * load(b + i));
}
template <class T>
void fill(T* a, T value, int64_t size) {
  for (int64_t i = 0; i < size; ++i) a[i] = value;
}

// gemm_rows and gemm_columns on tiles: c = init + a b; init null: 0.
template <class T>
Gemm<T> product(const T* a, int64_t a_stride, const T* b, int64_t b_stride, const T* init, T* c,
                int64_t c_stride, const Ahead* ahead = nullptr) {
  return {a, a_stride, b, b_stride, init, c_stride, c, c_stride, ahead};
}

}  // namespace vicinal::VICINAL_ISA
