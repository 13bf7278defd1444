// Random attend problems, and their answer by plain loops in double.
#pragma once
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "cpu/scalar.h"
#include "pattern.h"

namespace native_test {

using namespace vicinal;
using namespace vicinal::VICINAL_ISA;

// A tensor [B, N, H, D] of S in its own heap block of the exact size, so that a sanitizer sees every stray
// access.
template <class S>
struct Tensor {
  int64_t b = 0, n = 0, h = 0, d = 0;
  std::unique_ptr<S[]> data;

  Tensor() = default;
  Tensor(int64_t b_, int64_t n_, int64_t h_, int64_t d_)
      : b(b_), n(n_), h(h_), d(d_), data(new S[b_ * n_ * h_ * d_]()) {}
  int64_t size() const { return b * n * h * d; }
  Rows rows() const { return {data.get(), n * h * d, h * d, d}; }
  double at(int64_t i, int64_t j, int64_t k, int64_t l) const {
    return widen(data[((i * n + j) * h + k) * d + l]);
  }
};

struct Random {
  std::mt19937 engine;
  explicit Random(unsigned seed) : engine(seed) {}
  int below(int n) { return static_cast<int>(engine() % static_cast<unsigned>(n)); }
  bool chance(double p) { return engine() < p * 4294967296.0; }
  double normal() { return std::normal_distribution<double>()(engine); }
  template <class S>
  void fill(Tensor<S>& t) {
    for (int64_t i = 0; i < t.size(); ++i) narrow(static_cast<decltype(widen(S{}))>(normal()), &t.data[i]);
  }
  template <class T>
  std::unique_ptr<T[]> fill(int64_t n, double minus_infinity = 0) {
    std::unique_ptr<T[]> x(new T[n]);
    for (int64_t i = 0; i < n; ++i) x[i] = chance(minus_infinity) ? -T(INFINITY) : T(normal());
    return x;
  }
};

// One axis of a shifted window grid: lists of `window` entries per window, pads past the end.
struct Axis {
  int length, window, shift;
  int count() const { return (length + window - 1) / window; }
};

struct Grid {
  std::vector<AxisEntry> axes{{0, 0, 0, 0}};
  std::vector<PlanRow> rows;
  int slots = 1, tokens = 1, codes = 1;

  Grid(const std::vector<Axis>& shape) {
    int stride = 1, code_stride = 1;
    std::vector<std::vector<int>> q_begin(shape.size()), k_begin(shape.size()), flags(shape.size());
    for (int a = static_cast<int>(shape.size()) - 1; a >= 0; --a) {
      const Axis& x = shape[a];
      for (int i = 0; i < x.count(); ++i) {
        int bits = 0;
        for (int keys = 0; keys < 2; ++keys) {
          (keys ? k_begin : q_begin)[a].push_back(static_cast<int>(axes.size()));
          for (int r = 0; r < x.window; ++r) {
            const int at = (i * x.window + r + x.shift) % (x.count() * x.window);
            const bool pad = at >= x.length, wraps = x.shift && i == x.count() - 1 && r >= x.window - x.shift;
            const int code = keys ? -r * code_stride : (r + x.window - 1) * code_stride;
            axes.push_back({pad ? -(1 << 29) : at * stride, wraps ? 1 << a : 0, code, 0});
            bits |= pad ? kRowKeyPads | kRowQueryPads : 0;
            bits |= wraps ? kRowRegions : 0;
          }
        }
        flags[a].push_back(bits);
      }
      stride *= x.length, code_stride *= 2 * x.window - 1;
      slots *= x.window, tokens *= x.length;
    }
    codes = code_stride;
    std::vector<int> index(shape.size(), 0);
    for (bool more = true; more;) {
      PlanRow row{};
      for (int a = 0; a < 3; ++a) row.q_extent[a] = row.k_extent[a] = 1;
      for (size_t a = 0; a < shape.size(); ++a) {
        const size_t to = a + 3 - shape.size();
        row.q_begin[to] = q_begin[a][index[a]], row.k_begin[to] = k_begin[a][index[a]];
        row.q_extent[to] = row.k_extent[to] = shape[a].window;
        row.flags |= flags[a][index[a]];
      }
      rows.push_back(row);
      more = false;
      for (size_t a = shape.size(); a-- > 0 && !more;) {
        more = ++index[a] < shape[a].count();
        if (!more) index[a] = 0;
      }
    }
  }
};

// All tensors of one problem.
template <class S, class T>
struct Problem {
  Grid grid;
  Attend a{};
  Tensor<S> q, k, v, extra_k, extra_v, dout;
  std::unique_ptr<T[]> bias, q_scale, k_scale, key_bias, mask, dlse;
  int64_t seed = 0;

  Problem(Random& r, const std::vector<Axis>& shape) : grid(shape) {
    constexpr int dims[] = {1, 3, 7, 10, 16, 18, 24, 30, 32, 33, 48, 64, 70};
    a.dtype = sizeof(S) == 8 ? kF64 : sizeof(S) == 4 ? kF32 : std::is_same<S, Half>::value ? kF16 : kBF16;
    a.activation = r.chance(0.6) ? kSoftmax : static_cast<Activation>(r.below(4));
    a.batch = 1 + r.below(2), a.heads = a.kv_heads = 1 + r.below(3);
    a.head_dim = dims[r.below(13)], a.head_dim_v = r.chance(0.5) ? a.head_dim : dims[r.below(13)];
    a.n_q = a.n_k = grid.tokens;
    q = Tensor<S>(a.batch, a.n_q, a.heads, a.head_dim), k = Tensor<S>(a.batch, a.n_k, a.heads, a.head_dim);
    v = Tensor<S>(a.batch, a.n_k, a.heads, a.head_dim_v),
    dout = Tensor<S>(a.batch, a.n_q, a.heads, a.head_dim_v);
    r.fill(q), r.fill(k), r.fill(v), r.fill(dout);
    a.kv_heads = a.heads;
    a.q = q.rows(), a.k = k.rows(), a.v = v.rows();
    a.plan = {grid.axes.data(), grid.rows.data(), static_cast<int64_t>(grid.rows.size()), grid.slots,
              grid.slots};
    a.scale = 1 / std::sqrt(double(a.head_dim)), a.mask_value = r.chance(0.5) ? -INFINITY : -3.0;
    a.edge_row = r.chance(0.4), a.n_extra = a.edge_row + (r.chance(0.4) ? 1 + r.below(3) : 0);
    if (a.n_extra) {
      extra_k = Tensor<S>(a.batch, a.n_extra, a.heads, a.head_dim);
      extra_v = Tensor<S>(a.batch, a.n_extra, a.heads, a.head_dim_v);
      r.fill(extra_k), r.fill(extra_v);
      a.extra_k = extra_k.rows(), a.extra_v = extra_v.rows();
    }
    if (r.chance(0.7)) {
      a.bias_size = grid.codes + a.n_extra - a.edge_row;
      a.bias = (bias = r.fill<T>(a.heads * a.bias_size)).get();
    }
    a.scale_stride_n = a.heads;
    if (r.chance(0.3)) a.q_scale = (q_scale = r.fill<T>(a.batch * a.n_q * a.heads)).get();
    if (r.chance(0.3)) a.k_scale = (k_scale = r.fill<T>(a.batch * a.n_k * a.heads)).get();
    if (r.chance(0.4)) a.key_bias = (key_bias = r.fill<T>(a.batch * a.n_k, 0.3)).get();
    if (r.chance(0.3)) {
      const bool per_head = r.chance(0.5);
      a.mask_count = r.chance(0.5) ? a.plan.n_rows : 1 + r.below(3);
      a.mask_stride_h = per_head ? int64_t(grid.slots) * grid.slots : 0;
      a.mask_stride_w = int64_t(grid.slots) * grid.slots * (per_head ? a.heads : 1);
      a.mask = (mask = r.fill<T>(a.mask_count * a.mask_stride_w, 0.2)).get();
    }
    seed = static_cast<int64_t>(r.engine()) << 31 | r.below(1 << 30);
    if (r.chance(0.3)) a.dropout_p = 0.3, a.seed = &seed;
    a.head_offset = r.below(3), a.head_total = a.heads + 3;
    if (a.activation == kSoftmax && r.chance(0.5)) dlse = r.fill<T>(a.batch * a.n_q * a.heads);
    poison_ignored_keys();
  }
  // An ignored key may hold NaN.
  void poison_ignored_keys() {
    for (int64_t i = 0; key_bias && i < a.batch * a.n_k; ++i) {
      if (key_bias[i] != -T(INFINITY)) continue;
      for (int64_t d = 0; d < a.heads * a.head_dim; ++d)
        narrow(decltype(widen(S{}))(NAN), &k.data[i * a.heads * a.head_dim + d]);
      for (int64_t d = 0; d < a.heads * a.head_dim_v; ++d) {
        narrow(decltype(widen(S{}))(NAN), &v.data[i * a.heads * a.head_dim_v + d]);
      }
    }
  }
};

// The answer, and the gradients for dout and dlse.
struct Answer {
  Tensor<double> out, lse, dq, dk, dv, dbias, dextra_k, dextra_v;
};

template <class S, class T>
Answer solve(const Problem<S, T>& p) {
  const Attend& a = p.a;
  const int D = a.head_dim, Dv = a.head_dim_v;
  Answer r;
  r.out = Tensor<double>(a.batch, a.n_q, a.heads, Dv), r.lse = Tensor<double>(a.batch, a.n_q, a.heads, 1);
  r.dq = Tensor<double>(a.batch, a.n_q, a.heads, D), r.dk = Tensor<double>(a.batch, a.n_k, a.heads, D);
  r.dv = Tensor<double>(a.batch, a.n_k, a.heads, Dv), r.dbias = Tensor<double>(1, 1, a.heads, a.bias_size);
  r.dextra_k = Tensor<double>(a.batch, a.n_extra, a.heads, D);
  r.dextra_v = Tensor<double>(a.batch, a.n_extra, a.heads, Dv);
  const uint32_t limit = dropout_threshold(a.dropout_p);
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t w = 0; w < a.plan.n_rows; ++w)
      for (int h = 0; h < a.heads; ++h)
        for (int i = 0; i < a.plan.q_slots; ++i) {
          const PlanRow& row = a.plan.rows[w];
          const AxisEntry x = slot_entry(a.plan.axes, row.q_begin, row.q_extent, i);
          if (x.token < 0) continue;
          const int box = a.plan.k_slots, nk = box + a.n_extra - a.edge_row;
          const double qs = a.scale * (p.q_scale ? p.q_scale[(b * a.n_q + x.token) * a.heads + h] : T(1));
          struct Key {
            double s, p, slope, kept, dp, ks;
            int64_t bias_at;
            const Tensor<S>*k, *v;
            Tensor<double>*dk, *dv;
            int64_t row;
          };
          std::vector<Key> keys;
          double top = -INFINITY, sum = 0;
          for (int j = 0; j < nk; ++j) {
            const AxisEntry y =
                j < box ? slot_entry(a.plan.axes, row.k_begin, row.k_extent, j) : AxisEntry{-1, 0, 0, 0};
            Key key{0, 0, 0, 1, 0, 1, 0, &p.k, &p.v, &r.dk, &r.dv, y.token};
            if (y.token < 0) {
              if (j < box && !a.edge_row) continue;
              key.k = &p.extra_k, key.v = &p.extra_v, key.dk = &r.dextra_k, key.dv = &r.dextra_v;
              key.row = j < box ? 0 : a.edge_row + j - box;
            } else {
              key.ks = p.k_scale ? p.k_scale[(b * a.n_k + y.token) * a.heads + h] : T(1);
              key.s = p.key_bias ? p.key_bias[b * a.n_k + y.token] : T(0);
              if (key.s == -INFINITY) continue;
            }
            key.bias_at = j < box ? bias_index(x.code, y.code) : a.bias_size - (nk - j);
            double dot = 0;
            for (int d = 0; d < D; ++d) dot += p.q.at(b, x.token, h, d) * key.k->at(b, key.row, h, d);
            key.s += dot * qs * key.ks;
            if (p.bias) key.s += p.bias[h * a.bias_size + key.bias_at];
            if (p.mask && j < box) {
              key.s += p.mask[(b * a.plan.n_rows + w) % a.mask_count * a.mask_stride_w + h * a.mask_stride_h +
                              i * box + j];
            }
            if (j < box && crosses(x.region, y.region))
              key.s += a.activation == kSoftmax ? a.mask_value : -INFINITY;
            if (key.s == -INFINITY) continue;
            const uint32_t bh = static_cast<uint32_t>(b * a.head_total + a.head_offset + h);
            if (a.dropout_p > 0) {
              const Philox4 words = dropout_words(static_cast<uint64_t>(p.seed), j / 4, x.token, bh);
              key.kept = words.x[j % 4] >= limit ? 1 / (1 - a.dropout_p) : 0;
            }
            keys.push_back(key);
            top = std::max(top, key.s);
          }
          for (const Key& key : keys) sum += std::exp(key.s - top);
          const double lse = keys.empty() ? -INFINITY : top + std::log(sum);
          r.lse.data[(b * a.n_q + x.token) * a.heads + h] = lse;
          double delta = 0;
          const bool softmax = a.activation == kSoftmax;
          for (Key& key : keys) {
            const double up = std::max(key.s, 0.0);
            key.p = softmax                     ? std::exp(key.s - lse)
                    : a.activation == kIdentity ? key.s
                    : a.activation == kRelu     ? up
                                                : up * up;
            key.slope = a.activation == kIdentity ? 1 : a.activation == kRelu ? key.s > 0 : 2 * up;
            for (int d = 0; d < Dv; ++d) {
              const double value = key.v->at(b, key.row, h, d);
              r.out.data[((b * a.n_q + x.token) * a.heads + h) * Dv + d] += key.p * key.kept * value;
              key.dp += key.kept * p.dout.at(b, x.token, h, d) * value;
              key.dv->data[((b * key.dv->n + key.row) * a.heads + h) * Dv + d] +=
                  key.p * key.kept * p.dout.at(b, x.token, h, d);
            }
            delta += key.p * key.dp;
          }
          if (p.dlse) delta -= p.dlse[(b * a.n_q + x.token) * a.heads + h];
          for (const Key& key : keys) {
            const double ds = softmax ? key.p * (key.dp - delta) : key.slope * key.dp;
            if (p.bias) r.dbias.data[h * a.bias_size + key.bias_at] += ds;
            for (int d = 0; d < D; ++d) {
              r.dq.data[((b * a.n_q + x.token) * a.heads + h) * D + d] +=
                  ds * qs * key.ks * key.k->at(b, key.row, h, d);
              key.dk->data[((b * key.dk->n + key.row) * a.heads + h) * D + d] +=
                  ds * qs * key.ks * p.q.at(b, x.token, h, d);
            }
          }
        }
  return r;
}

}  // namespace native_test
