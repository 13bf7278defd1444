// What one tile of tokens of one head does with the sums of linear.h, forward and backward: `read` takes from
// them, `add` adds to them. Without a mask and between blocks there is nothing else.
#pragma once
#include "linear_map.h"

namespace vicinal::VICINAL_ISA {

constexpr int kTile = 64;  // tokens

// Sizes of a problem, rounded up to whole vectors where a `p` stands at the end.
template <class T>
struct Sizes {
  int32_t dim, dim_v, dim_den, K, Kp, Kd, Kdp, Vp, shared;
  bool own_den;

  explicit Sizes(const Linear& a) {
    const int32_t extra = a.constant != 0;
    own_den = a.q_den.data != nullptr;
    dim = a.dim, dim_v = a.dim_v, dim_den = own_den ? a.dim_den : a.dim;
    K = dim + extra, Kd = dim_den + extra;
    Kp = round_up(K, kLanes<T>), Kdp = round_up(Kd, kLanes<T>), Vp = round_up(dim_v, kLanes<T>);
    shared = a.heads_qk ? a.heads / a.heads_qk : 1;
  }
  int64_t s() const { return int64_t(K) * Vp; }
  int64_t st() const { return int64_t(dim_v) * Kp; }
};

// Sums of one head: s [K][Vp], its transpose [dim_v][Kp], z [Kdp]; null where not needed.
template <class T>
struct Sums {
  T *s, *st, *z;
};

// Memory that the next tile will touch, fetched a few lines at a time while this one is multiplied.
struct Coming {
  struct Part {
    uintptr_t base;
    int64_t stride;
    int32_t rows, bytes;
  };
  Part parts[6];
  int count = 0, at = 0, end = 0, step = 0;
  const Ahead ahead{&Coming::fetch, this};

  void clear() { count = at = end = 0; }
  template <class S>
  void add(const Place<S>& x) {
    Part& p = parts[count++];
    const int64_t width = x.by_rows() ? x.dim : x.n;
    p = {reinterpret_cast<uintptr_t>(x.data),
         static_cast<int64_t>(sizeof(S)) * (x.by_rows() ? x.stride_n : x.stride_d), x.by_rows() ? x.n : x.dim,
         static_cast<int32_t>(width * sizeof(S))};
    if (p.rows > end) end = p.rows;
  }
  void spread(int steps) { step = (end + steps - 1) / steps; }
  static void fetch(void* context) {
    Coming& c = *static_cast<Coming*>(context);
    const int end = c.at + c.step < c.end ? c.at + c.step : c.end;
    for (int i = c.at; i < end; ++i) {
      for (int k = 0; k < c.count; ++k) {
        const Part& p = c.parts[k];
        if (i >= p.rows) continue;
        const uintptr_t begin = p.base + static_cast<uintptr_t>(i * p.stride);
        for (uintptr_t line = begin & ~uintptr_t(63); line < begin + p.bytes; line += 64) {
          __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 3);
        }
      }
    }
    c.at = end;
  }
};

template <class S, class T>
struct Head {
  const Linear& a;
  const Sizes<T> z;        // sizes
  T *f, *f_slopes, *fd;    // features of queries [kTile][Kp], derivatives, features of the denominator
  T *p, *p_slopes, *pd;    // of keys
  T *v, *o, *u, *du, *dd;  // values, outputs [kTile][Vp]; gradients of features [kTile][Kp], and their sums
  T *ones, *totals;        // kTile, Kp
  T *den, *inverse, *d, *seen;  // kTile each; seen: 0 for a masked key
  int64_t b, n0;                // the tile at work
  int32_t n;
  Coming coming;

  explicit Head(const Linear& linear) : a(linear), z(linear) {}

  void carve(cpu::Arena& arena, bool backward) {
    f = arena.take<T>(kTile * z.Kp), p = arena.take<T>(kTile * z.Kp);
    fd = z.own_den ? arena.take<T>(kTile * z.Kdp) : f, pd = z.own_den ? arena.take<T>(kTile * z.Kdp) : p;
    v = arena.take<T>(kTile * z.Vp), o = arena.take<T>(kTile * z.Vp);
    den = arena.take<T>(kTile), inverse = arena.take<T>(kTile), d = arena.take<T>(kTile);
    seen = arena.take<T>(kTile), ones = arena.take<T>(kTile), totals = arena.take<T>(z.Kp);
    f_slopes = p_slopes = u = du = dd = nullptr;
    if (!backward) return;
    f_slopes = arena.take<T>(kTile * z.Kp), p_slopes = arena.take<T>(kTile * z.Kp);
    u = arena.take<T>(kTile * z.Kp), du = arena.take<T>(kTile * z.Kp);
    dd = z.own_den ? arena.take<T>(kTile * z.Kdp) : nullptr;
  }

  void set_tile(int64_t sample, int64_t begin, int32_t count) { b = sample, n0 = begin, n = count; }
  Place<S> place(const Strided& x, int64_t h, int32_t width) const { return {x, b, n0, n, h, width}; }

  void load_q(int32_t hq) {
    pack_tile(place(a.q, hq, z.dim), f, z.Kp);
    map_tile(a.map_q, a.param_q, a.scale, f, f_slopes, n, z.dim, z.Kp);
    if (z.own_den) {
      pack_tile(place(a.q_den, hq, z.dim_den), fd, z.Kdp);
      map_tile<T>(kMapIdentity, 0.0, a.scale, fd, nullptr, n, z.dim_den, z.Kdp);
    }
    if (a.constant == 0) return;
    for (int32_t i = 0; i < n; ++i) f[int64_t(i) * z.Kp + z.dim] = fd[int64_t(i) * z.Kdp + z.dim_den] = 1;
  }

  void load_k(int32_t hk) {
    pack_tile(place(a.k, hk, z.dim), p, z.Kp);
    map_tile(a.map_k, a.param_k, 1.0, p, p_slopes, n, z.dim, z.Kp);
    if (z.own_den) pack_tile(place(a.k_den, hk, z.dim_den), pd, z.Kdp);
    const T c = T(a.constant);
    for (int32_t i = 0; i < n && c != 0; ++i) {
      p[int64_t(i) * z.Kp + z.dim] = pd[int64_t(i) * z.Kdp + z.dim_den] = c;
    }
    if (!a.key_mask) return;
    const uint8_t* mask = a.key_mask + b * a.n_k + n0;
    for (int32_t i = 0; i < n; ++i) {
      seen[i] = mask[i] ? T(0) : T(1);
      if (!mask[i]) continue;
      fill(p + int64_t(i) * z.Kp, T(0), z.Kp);
      if (p_slopes) fill(p_slopes + int64_t(i) * z.Kp, T(0), z.Kp);
      if (z.own_den) fill(pd + int64_t(i) * z.Kdp, T(0), z.Kdp);
    }
  }

  void load_v(int32_t h) {
    pack_tile(place(a.v, h, z.dim_v), v, z.Vp);
    for (int32_t i = 0; a.key_mask && i < n; ++i) {
      if (seen[i] == 0) fill(v + int64_t(i) * z.Vp, T(0), z.Vp);
    }
  }

  // After load_q: out and den of the tile.
  void read(const LinearFwd& w, int32_t h, const Sums<T>& sums) {
    gemm_rows(product<T>(f, z.Kp, sums.s, z.Vp, nullptr, o, z.Vp, &coming.ahead), n, z.K, z.Vp / kLanes<T>);
    if (a.normalize) row_dots(fd, z.Kdp, sums.z, 0, n, z.Kdp, den);
    finish(w, h);
  }
  // den + eps, stored, and its inverse.
  void finish_den(const LinearFwd& w, int32_t h) {
    T* to = static_cast<T*>(w.den) + (b * a.heads + h) * a.n_q + n0;
    for (int32_t i = 0; i < n; ++i) den[i] += T(a.eps), to[i] = den[i];
    invert();
  }
  // o / (den + eps), stored.
  void finish(const LinearFwd& w, int32_t h) {
    if (a.normalize) finish_den(w, h);
    unpack_tile(o, z.Vp, a.normalize ? inverse : nullptr, place(w.out, h, z.dim_v));
  }
  void invert() {
    for (int32_t i = 0; i < n; ++i) {
      const T size = den[i] < 0 ? -den[i] : den[i];
      inverse[i] = size < T(kSmallestDen) ? T(0) : T(1) / den[i];
    }
  }

  // After load_k and load_v: s and z of the tile are added.
  void add(const Sums<T>& sums) {
    gemm_columns(product<T>(p, z.Kp, v, z.Vp, sums.s, sums.s, z.Vp, &coming.ahead), z.K, n, z.Vp / kLanes<T>);
    if (a.normalize) add_rows<T>(pd, z.Kdp, nullptr, n, z.Kdp, sums.z);
  }

  // Where tokens are contiguous (NCHW), tiles of keys and queries stay [K][kTile], lanes are tokens, and only
  // values are transposed.
  bool keys_by_columns() const {
    return a.k.stride_n == 1 && a.k.stride_d != 1 && z.dim > 1 && a.constant == 0 && !a.key_mask &&
           !z.own_den;
  }
  bool queries_by_columns(const Strided& out) const {
    return a.q.stride_n == 1 && a.q.stride_d != 1 && z.dim > 1 && a.constant == 0 && !z.own_den &&
           out.stride_n == 1 && out.stride_d != 1 && z.dim_v > 1;
  }
  int32_t whole_tokens() const { return round_up(n, kLanes<T>); }
  void load_columns(const Strided& x, int32_t h, FeatureMap map, double param, double factor, T* to) {
    pack_tile(place(x, h, z.dim).transposed(), to, kTile);
    map_tile<T>(map, param, factor, to, nullptr, z.dim, n, kTile);
  }
  void add_columns(const Sums<T>& sums) {
    gemm_rows(product<T>(p, kTile, v, z.Vp, sums.s, sums.s, z.Vp, &coming.ahead), z.K, n, z.Vp / kLanes<T>);
    if (!a.normalize) return;
    fill(ones, T(1), kTile);
    row_dots(p, kTile, ones, 0, z.K, whole_tokens(), totals);
    for (int32_t k = 0; k < z.K; ++k) sums.z[k] += totals[k];
  }
  void read_columns(const LinearFwd& w, int32_t h, const Sums<T>& sums) {
    const int32_t whole = whole_tokens();
    gemm_columns(product<T>(sums.s, z.Vp, f, kTile, nullptr, o, kTile, &coming.ahead), z.dim_v, z.K,
                 whole / kLanes<T>);
    if (a.normalize) {
      fill(den, T(0), kTile);
      add_rows<T>(f, kTile, sums.z, z.K, whole, den);
      finish_den(w, h);
      for (int32_t d = 0; d < z.dim_v; ++d) multiply_into(o + d * kTile, inverse, whole);
    }
    unpack_tile<S, T>(o, kTile, nullptr, place(w.out, h, z.dim_v).transposed());
  }

  // r = dout / den in o, for read_gradient.
  void load_dout(const LinearBwd& w, int32_t h) {
    pack_tile(place(w.dout, h, z.dim_v), o, z.Vp);
    if (!a.normalize) return;
    const T* from = static_cast<const T*>(w.den) + (b * a.heads + h) * a.n_q + n0;
    for (int32_t i = 0; i < n; ++i) den[i] = from[i];
    invert();
    scale_rows(o, z.Vp, inverse, n, z.Vp);
  }

  // After load_q and load_dout: the gradient of f into u, and what the tile adds to the gradient of the sums.
  void read_gradient(const Sums<T>& sums, const Sums<T>& grads) {
    gemm_rows(product<T>(o, z.Vp, sums.st, z.Kp, nullptr, u, z.Kp, &coming.ahead), n, z.dim_v,
              z.Kp / kLanes<T>);
    if (a.normalize) {
      row_dots(f, z.Kp, u, z.Kp, n, z.Kp, d);
      for (int32_t i = 0; i < n; ++i) d[i] *= -inverse[i];
      add_to_rows(z.own_den ? dd : u, z.Kdp, d, sums.z, n, z.Kdp);
      add_rows<T>(fd, z.Kdp, d, n, z.Kdp, grads.z);
    }
    gemm_columns(product<T>(f, z.Kp, o, z.Vp, grads.s, grads.s, z.Vp, &coming.ahead), z.K, n,
                 z.Vp / kLanes<T>);
  }

  // After load_k and load_v: the gradient of p into u; dv is stored.
  void add_gradient(const LinearBwd& w, int32_t h, const Sums<T>& grads) {
    gemm_rows(product<T>(v, z.Vp, grads.st, z.Kp, nullptr, u, z.Kp, &coming.ahead), n, z.dim_v,
              z.Kp / kLanes<T>);
    if (a.normalize) add_to_rows<T>(z.own_den ? dd : u, z.Kdp, nullptr, grads.z, n, z.Kdp);
    gemm_rows(product<T>(p, z.Kp, grads.s, z.Vp, nullptr, o, z.Vp, &coming.ahead), n, z.K, z.Vp / kLanes<T>);
    unpack_tile<S, T>(o, z.Vp, nullptr, place(w.dv, h, z.dim_v));
  }

  // Gradients of features gather over the heads that share them: begin, gather after each head, store.
  void begin_gather() {
    if (z.own_den) fill(dd, T(0), int64_t(kTile) * z.Kdp);
    if (z.shared > 1) fill(du, T(0), int64_t(n) * z.Kp);
  }
  void gather() {
    if (z.shared > 1) add_into(du, u, int64_t(n) * z.Kp);
  }
  T* gathered() { return z.shared > 1 ? du : u; }
  void store_dq(const LinearBwd& w, int32_t hq) {
    multiply_into(gathered(), f_slopes, int64_t(n) * z.Kp);
    unpack_tile<S, T>(gathered(), z.Kp, nullptr, place(w.dq, hq, z.dim));
    if (!z.own_den) return;
    fill(inverse, T(a.scale), n);
    unpack_tile(dd, z.Kdp, inverse, place(w.dq_den, hq, z.dim_den));
  }
  void store_dk(const LinearBwd& w, int32_t hk) { store_dk_of(gathered(), w, hk); }
  void store_dk_of(T* gradient, const LinearBwd& w, int32_t hk) {
    multiply_into(gradient, p_slopes, int64_t(n) * z.Kp);
    unpack_tile<S, T>(gradient, z.Kp, nullptr, place(w.dk, hk, z.dim));
    if (!z.own_den) return;
    unpack_tile<S, T>(dd, z.Kdp, a.key_mask ? seen : nullptr, place(w.dk_den, hk, z.dim_den));
  }
};

// Between the caller's sums [K][dim_v] and padded ones.
template <class T>
void load_sums(const void* s, const void* z, int64_t index, const Sizes<T>& sizes, const Sums<T>& to) {
  const int32_t V = sizes.dim_v;
  fill(to.s, T(0), sizes.s());
  if (to.z) fill(to.z, T(0), sizes.Kdp);
  if (s) {
    const T* from = static_cast<const T*>(s) + index * sizes.K * V;
    for (int32_t k = 0; k < sizes.K; ++k) {
      for (int32_t d = 0; d < V; ++d) to.s[int64_t(k) * sizes.Vp + d] = from[int64_t(k) * V + d];
    }
  }
  if (z && to.z) {
    for (int32_t k = 0; k < sizes.Kd; ++k) to.z[k] = static_cast<const T*>(z)[index * sizes.Kd + k];
  }
}
template <class T>
void store_sums(const Sums<T>& from, const Sizes<T>& sizes, void* s, void* z, int64_t index) {
  const int32_t V = sizes.dim_v;
  if (s) {
    T* to = static_cast<T*>(s) + index * sizes.K * V;
    for (int32_t k = 0; k < sizes.K; ++k) {
      for (int32_t d = 0; d < V; ++d) to[int64_t(k) * V + d] = from.s[int64_t(k) * sizes.Vp + d];
    }
  }
  for (int32_t k = 0; z && k < sizes.Kd; ++k) static_cast<T*>(z)[index * sizes.Kd + k] = from.z[k];
}
// st from s; its rows of Kp are zero from K on.
template <class T>
void transpose_sums(const Sums<T>& sums, const Sizes<T>& sizes) {
  transpose_tile(sums.s, sizes.Vp, sizes.K, sizes.dim_v, sums.st, sizes.Kp);
}

}  // namespace vicinal::VICINAL_ISA
