// A chunk of the causal loop: the decay inside it, and its squares of weights [kTile][kTile], which are
// lower-triangular: products with them go in strips of kStrip tokens and leave out what lies above.
#pragma once
#include "linear_kernels.h"

namespace vicinal::VICINAL_ISA {

constexpr int kStrip = 16;

inline int32_t chunk_tokens(const Linear& a) {
  if (a.chunk_size <= 0 || a.chunk_size >= kTile) return kTile;
  return round_up(static_cast<int32_t>(a.chunk_size), kStrip);
}

template <class S, class T>
struct Chunk : Head<S, T> {
  using Head<S, T>::a;
  using Head<S, T>::z;
  using Head<S, T>::n;

  T* power;             // exp(b_i - b_j) for j <= i, 0 above the diagonal; 1 instead without a decay
  T *e, *left;          // exp(b_i), exp(b_last - b_j)
  T* step_sums;         // b
  T* weights;           // a square
  T* columns;           // a tile transposed, [most of K, Kd, dim_v][kTile]
  T keep;               // exp(b_last)
  bool constant_ready;  // power and e of this head's constant decay are there

  explicit Chunk(const Linear& linear) : Head<S, T>(linear) {}

  void carve_chunk(cpu::Arena& arena) {
    power = arena.take<T>(kTile * kTile), weights = arena.take<T>(kTile * kTile);
    e = arena.take<T>(kTile), left = arena.take<T>(kTile), step_sums = arena.take<T>(kTile);
    int32_t most = z.K > z.Kd ? z.K : z.Kd;
    if (z.dim_v > most) most = z.dim_v;
    columns = arena.take<T>(int64_t(most) * kTile);
  }
  void start_head() {
    constant_ready = false;
    fill(this->ones, T(1), kTile);
    if (a.decay) return;
    for (int i = 0; i < kTile; ++i) {
      for (int j = 0; j < kTile; ++j) power[i * kTile + j] = j <= i ? T(1) : T(0);
    }
  }

  const T* decay_of(int32_t h) const {
    return static_cast<const T*>(a.decay) + this->b * a.decay_stride_b + this->n0 * a.decay_stride_n +
           h * a.decay_stride_h;
  }
  static void exponentials(T* to, int count) {
    constexpr T log2e = T(1.44269504088896340736);
    for (int i = 0; i < count; i += kLanes<T>) store(to + i, exp2(load(to + i) * log2e));
  }
  // The decay of the tile that was set, for head h.
  void set_decay(int32_t h) {
    if (!a.decay) return;
    const bool constant = a.decay_stride_n == 0;
    const T* g = decay_of(h);
    if (!constant || !constant_ready) {
      const int count = constant ? kTile : n;
      T sum = 0;
      for (int i = 0; i < kTile; ++i) {
        if (i < count) sum += g[i * a.decay_stride_n];
        step_sums[i] = e[i] = sum;
      }
      exponentials(e, kTile);
      for (int i = 0; i < count; ++i) set_power_row(i);
      constant_ready = constant;
    }
    const T last = step_sums[n - 1];
    for (int j = 0; j < kTile; ++j) left[j] = j < n ? last - step_sums[j] : T(0);
    exponentials(left, kTile);
    keep = e[n - 1];
  }
  void set_power_row(int i) {
    constexpr T log2e = T(1.44269504088896340736);
    constexpr int kN = kLanes<T>;
    const Vec<T> least = splat(-T(__builtin_inf()));
    const int end = i / kStrip * kStrip + kStrip;
    for (int j = 0; j < end; j += kN) {
      Vec<T> x = (step_sums[i] - load(step_sums + j)) * log2e;
      for (int u = 0; j + kN > i && u < kN; ++u) x[u] = j + u <= i ? x[u] : least[u];
      store(power + i * kTile + j, exp2(x));
    }
  }

  // square_ij = row_i . column_j for the strips up to the diagonal.
  void square(const T* rows, int stride, int steps, T* to) {
    for (int i0 = 0; i0 < n; i0 += kStrip) {
      const int m = n - i0 < kStrip ? n - i0 : kStrip;
      gemm_rows(product<T>(rows + int64_t(i0) * stride, stride, columns, kTile, nullptr, to + i0 * kTile,
                           kTile, &this->coming.ahead),
                m, steps, (i0 + kStrip) / kLanes<T>);
    }
  }
  // square_ij = (square_ij + d_i) * power_ij; d null: 0.
  void apply_power(const T* d, T* square) {
    for (int i = 0; i < n; ++i) {
      const int strip = i / kStrip * kStrip, first = a.decay || d ? 0 : strip;  // to its left power is 1
      const T added = d ? d[i] : T(0);
      for (int j = first; j < strip + kStrip; j += kLanes<T>) {
        T* at = square + i * kTile + j;
        store(at, (load(at) + added) * load(power + i * kTile + j));
      }
    }
  }
  // square_ij = d_i * power_ij.
  void outer_square(const T* d, T* to) {
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < i / kStrip * kStrip + kStrip; j += kLanes<T>) {
        store(to + i * kTile + j, load(power + i * kTile + j) * d[i]);
      }
    }
  }
  // to_i += sum over j <= i of square_ij x_j.
  void below(const T* square, const T* x, int stride, T* to) {
    for (int i0 = 0; i0 < n; i0 += kStrip) {
      const int m = n - i0 < kStrip ? n - i0 : kStrip, steps = i0 + m;
      T* at = to + int64_t(i0) * stride;
      gemm_rows(product<T>(square + i0 * kTile, kTile, x, stride, at, at, stride, &this->coming.ahead), m,
                steps, stride / kLanes<T>);
    }
  }
  // to_j += sum over i >= j of square_ij x_i.
  void above(const T* square, const T* x, int stride, T* to) {
    for (int j0 = 0; j0 < n; j0 += kStrip) {
      const int m = n - j0 < kStrip ? n - j0 : kStrip;
      T* at = to + int64_t(j0) * stride;
      gemm_columns(product<T>(square + j0 * kTile + j0, kTile, x + int64_t(j0) * stride, stride, at, at,
                              stride, &this->coming.ahead),
                   m, n - j0, stride / kLanes<T>);
    }
  }
  // to_i = sum over j of square_ij.
  void row_sums(const T* square, T* to) {
    for (int i0 = 0; i0 < n; i0 += kStrip) {
      const int m = n - i0 < kStrip ? n - i0 : kStrip;
      row_dots(square + i0 * kTile, kTile, this->ones, 0, m, i0 + kStrip, to + i0);
    }
  }
  void transpose_to_columns(const T* tile, int stride, int dim) {
    transpose_tile(tile, stride, n, dim, columns, kTile);
    if (n % kStrip == 0) return;
    const int from = round_up(n, kLanes<T>), to = round_up(n, kStrip);
    for (int d = 0; d < dim; ++d) {
      for (int i = from; i < to; ++i) columns[int64_t(d) * kTile + i] = 0;
    }
  }

  // Fetch the next chunk's tiles while this one is multiplied.
  template <class... More>
  void set_next_chunk(int32_t hq, int32_t h, int64_t end, int steps, const More&... tensors) {
    this->coming.clear();
    const int64_t begin = this->n0 + n;
    if (begin >= end) return;
    const int32_t count = static_cast<int32_t>(end - begin < n ? end - begin : n);
    this->coming.add(Place<S>(a.q, this->b, begin, count, hq, z.dim));
    this->coming.add(Place<S>(a.k, this->b, begin, count, hq, z.dim));
    (this->coming.add(Place<S>(tensors, this->b, begin, count, h, z.dim_v)), ...);
    this->coming.spread(steps);
  }
};

}  // namespace vicinal::VICINAL_ISA
