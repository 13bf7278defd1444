// attend in plain loops: the formula of attend.h, one (batch, row, head) at a time.
#pragma once
#include <cmath>
#include <vector>

#include "pattern.h"
#include "scalar.h"

namespace vicinal::VICINAL_ISA {

// The slots of one plan row, and the scores of one head of it.
template <class S, class T>
struct Naive {
  const Attend& a;
  const PlanRow* row = nullptr;
  int64_t b = 0, r = 0;
  int32_t h = 0, nq = 0, nk = 0, box = 0;
  std::vector<AxisEntry> q, k;
  std::vector<T> kept;

  explicit Naive(const Attend& attend) : a(attend) {}

  void set_row(int64_t batch, int64_t index) {
    b = batch, r = index, row = a.plan.rows + index;
    nq = row->q_extent[0] * row->q_extent[1] * row->q_extent[2];
    box = row->k_extent[0] * row->k_extent[1] * row->k_extent[2];
    nk = box + (a.n_extra - a.edge_row);
    q.resize(nq), k.resize(nk), kept.assign(nk, T(1));
    for (int32_t i = 0; i < nq; ++i) q[i] = slot_entry(a.plan.axes, row->q_begin, row->q_extent, i);
    for (int32_t j = 0; j < box; ++j) k[j] = slot_entry(a.plan.axes, row->k_begin, row->k_extent, j);
    for (int32_t j = box; j < nk; ++j) k[j] = {-1, 0, 0, 0};
  }
  int32_t extra(int32_t j) const {
    return j >= box ? a.edge_row + j - box : k[j].token < 0 && a.edge_row ? 0 : -1;
  }
  bool excluded(int32_t j) const {
    if (j >= box) return false;
    if (k[j].token < 0) return !a.edge_row;
    return a.key_bias && static_cast<const T*>(a.key_bias)[b * a.n_k + k[j].token] == -T(INFINITY);
  }
  const S* key_row(const Rows& t, const Rows& extras, int32_t j) const {
    return extra(j) >= 0 ? row_of<S>(extras, b, extra(j), h) : row_of<S>(t, b, k[j].token, h);
  }
  T scale_of(const void* scales, int64_t n, int32_t token) const {
    return scales && token >= 0 ? static_cast<const T*>(scales)[(b * n + token) * a.scale_stride_n + h]
                                : T(1);
  }
  int64_t bias_at(int32_t i, int32_t j) const {
    return h * a.bias_size + (j < box ? q[i].code + k[j].code : a.bias_size - (nk - j));
  }
  T score(int32_t i, int32_t j) const {
    if (excluded(j)) return -T(INFINITY);
    const S *x = row_of<S>(a.q, b, q[i].token, h), *y = key_row(a.k, a.extra_k, j);
    T dot = 0;
    for (int32_t d = 0; d < a.head_dim; ++d) dot += widen(x[d]) * widen(y[d]);
    T s = dot * T(a.scale) * scale_of(a.q_scale, a.n_q, q[i].token) * scale_of(a.k_scale, a.n_k, k[j].token);
    if (a.bias) s += static_cast<const T*>(a.bias)[bias_at(i, j)];
    if (j >= box) return s;
    if (a.key_bias && k[j].token >= 0) s += static_cast<const T*>(a.key_bias)[b * a.n_k + k[j].token];
    if (a.mask) {
      const int64_t w = (b * a.plan.n_rows + r) % a.mask_count;
      s += static_cast<const T*>(
          a.mask)[w * a.mask_stride_w + h * a.mask_stride_h + int64_t(i) * a.plan.k_slots + j];
    }
    if (crosses(q[i].region, k[j].region)) s = a.activation == kSoftmax ? s + T(a.mask_value) : -T(INFINITY);
    return s;
  }
  T weight(T s, T lse) const {
    if (s == -T(INFINITY)) return 0;
    if (a.activation == kSoftmax) return std::exp(s - lse);
    if (a.activation == kIdentity) return s;
    const T t = s < 0 ? T(0) : s;
    return a.activation == kRelu ? t : t * t;
  }
  T slope(T s) const {  // of a weight that is not a softmax
    if (a.activation == kIdentity) return s == -T(INFINITY) ? 0 : 1;
    return s > 0 ? (a.activation == kRelu ? T(1) : 2 * s) : s != s ? s : T(0);
  }
  void set_kept(int32_t i) {
    if (!(a.dropout_p > 0)) return;
    const uint32_t limit = dropout_threshold(a.dropout_p);
    const uint32_t bh = static_cast<uint32_t>(b * a.head_total + a.head_offset + h);
    for (int32_t j = 0; j < nk; j += 4) {
      const Philox4 words = dropout_words(static_cast<uint64_t>(*a.seed), j / 4, q[i].token, bh);
      for (int32_t u = 0; u < 4 && j + u < nk; ++u)
        kept[j + u] = words.x[u] >= limit ? T(1 / (1 - a.dropout_p)) : 0;
    }
  }
};

template <class S, class T>
void naive_fwd(const AttendFwd& p, int threads) {
  const Attend& a = p.a;
  const int64_t tasks = a.batch * a.plan.n_rows;
#pragma omp parallel num_threads(threads)
  {
    Naive<S, T> w(a);
    std::vector<T> s, out(a.head_dim_v);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      w.set_row(task / a.plan.n_rows, task % a.plan.n_rows);
      s.resize(w.nk);
      for (w.h = 0; w.h < a.heads; ++w.h) {
        for (int32_t i = 0; i < w.nq; ++i) {
          if (w.q[i].token < 0) continue;
          T top = -T(INFINITY), sum = 0;
          for (int32_t j = 0; j < w.nk; ++j) {
            s[j] = w.score(i, j);
            top = s[j] > top || s[j] != s[j] ? s[j] : top;
          }
          const bool dead = top == -T(INFINITY);
          for (int32_t j = 0; j < w.nk; ++j) sum += dead ? T(0) : std::exp(s[j] - top);
          const T lse = dead ? top : top + std::log(sum);
          w.set_kept(i);
          for (auto& x : out) x = 0;
          for (int32_t j = 0; j < w.nk; ++j) {
            const T weight = w.weight(s[j], lse) * w.kept[j];
            if (s[j] == -T(INFINITY)) continue;
            const S* v = w.key_row(a.v, a.extra_v, j);
            for (int32_t d = 0; d < a.head_dim_v; ++d) out[d] += weight * widen(v[d]);
          }
          S* to = row_of<S>(p.out, w.b, w.q[i].token, w.h);
          for (int32_t d = 0; d < a.head_dim_v; ++d) narrow(out[d], to + d);
          if (p.lse) static_cast<T*>(p.lse)[(w.b * a.n_q + w.q[i].token) * p.lse_stride_n + w.h] = lse;
        }
      }
    }
  }
}

template <class S, class T>
void naive_bwd(const AttendBwd& p, int threads) {
  const Attend& a = p.a;
  const int32_t D = a.head_dim, Dv = a.head_dim_v;
  auto zero = [](void* data, int64_t n) {
    for (int64_t i = 0; data && i < n; ++i) static_cast<T*>(data)[i] = 0;
  };
  zero(p.dbias, a.heads * a.bias_size);
  auto extra_row = [&](const Rows& t, int64_t b, int32_t e, int32_t h) { return row_of<T>(t, b, e, h); };
  // One task per head, so that sums over rows and batch have one order.
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int32_t h = 0; h < a.heads; ++h) {
    Naive<S, T> w(a);
    w.h = h;
    std::vector<T> s, pj, dp, dq(D), dk, dv;
    for (int64_t b = 0; b < a.batch; ++b) {
      for (int32_t e = 0; e < a.n_extra; ++e) {
        if (p.dextra_k.data) zero(extra_row(p.dextra_k, b, e, h), D);
        if (p.dextra_v.data) zero(extra_row(p.dextra_v, b, e, h), Dv);
      }
      for (int64_t r = 0; r < a.plan.n_rows; ++r) {
        w.set_row(b, r);
        s.resize(w.nk), pj.resize(w.nk), dp.resize(w.nk);
        dk.assign(size_t(w.nk) * D, 0), dv.assign(size_t(w.nk) * Dv, 0);
        for (int32_t i = 0; i < w.nq; ++i) {
          if (w.q[i].token < 0) continue;
          const int64_t at = (b * a.n_q + w.q[i].token) * p.lse_stride_n + h;
          const bool soft = a.activation == kSoftmax;
          const T lse = soft ? static_cast<const T*>(p.lse)[at] : 0;
          const S *x = row_of<S>(a.q, b, w.q[i].token, h), *dout = row_of<S>(p.dout, b, w.q[i].token, h);
          T delta = soft && p.dlse ? -static_cast<const T*>(p.dlse)[at] : T(0);
          w.set_kept(i);
          for (int32_t j = 0; j < w.nk; ++j) {
            s[j] = w.score(i, j);
            pj[j] = w.weight(s[j], lse);
            dp[j] = 0;
            if (s[j] == -T(INFINITY)) continue;
            const S* v = w.key_row(a.v, a.extra_v, j);
            for (int32_t d = 0; d < Dv; ++d) dp[j] += widen(dout[d]) * widen(v[d]);
            dp[j] *= w.kept[j];
            delta += soft ? pj[j] * dp[j] : T(0);
          }
          const T qs = T(a.scale) * w.scale_of(a.q_scale, a.n_q, w.q[i].token);
          for (auto& v : dq) v = 0;
          for (int32_t j = 0; j < w.nk; ++j) {
            if (s[j] == -T(INFINITY)) continue;
            const T ds = soft ? pj[j] * (dp[j] - delta) : w.slope(s[j]) * dp[j];
            const T f = ds * qs * w.scale_of(a.k_scale, a.n_k, w.k[j].token);
            const S* k = w.key_row(a.k, a.extra_k, j);
            for (int32_t d = 0; d < D; ++d)
              dq[d] += f * widen(k[d]), dk[size_t(j) * D + d] += f * widen(x[d]);
            for (int32_t d = 0; d < Dv; ++d) dv[size_t(j) * Dv + d] += pj[j] * w.kept[j] * widen(dout[d]);
            if (p.dbias) static_cast<T*>(p.dbias)[w.bias_at(i, j)] += ds;
          }
          for (int32_t d = 0; d < D; ++d) narrow(dq[d], row_of<S>(p.dq, b, w.q[i].token, h) + d);
        }
        for (int32_t j = 0; j < w.nk; ++j) {
          const int32_t e = w.extra(j);
          const T *dkj = dk.data() + size_t(j) * D, *dvj = dv.data() + size_t(j) * Dv;
          if (e >= 0) {
            for (int32_t d = 0; p.dextra_k.data && d < D; ++d) extra_row(p.dextra_k, b, e, h)[d] += dkj[d];
            for (int32_t d = 0; p.dextra_v.data && d < Dv; ++d) extra_row(p.dextra_v, b, e, h)[d] += dvj[d];
          } else if (w.k[j].token >= 0) {
            for (int32_t d = 0; d < D; ++d) narrow(dkj[d], row_of<S>(p.dk, b, w.k[j].token, h) + d);
            for (int32_t d = 0; d < Dv; ++d) narrow(dvj[d], row_of<S>(p.dv, b, w.k[j].token, h) + d);
          }
        }
      }
    }
  }
}

}  // namespace vicinal::VICINAL_ISA
