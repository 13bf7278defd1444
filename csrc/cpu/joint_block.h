// What the forward and the backward of joint attention share: tiles of columns of W = [v | u], packed rows,
// and the scores of one group.
//
// All products are gemm.h's. A tile is up to kTileLanes columns of v and as many of u (two runs of v without
// u), packed as [tokens][tile lanes] with zeros for ignored keys, so that every loop over columns is a loop
// over whole vectors and both halves of a gate lie side by side.
//
// Why not MKL: on the AMD cores that this was measured on, MKL's sgemm reaches 90-98 GFLOP/s at these sizes
// and gemm.h 190-209 (one thread, FMA limit 221-233).
#pragma once
#include "gemm.h"
#include "joint.h"
#include "memory.h"
#include "philox.h"

namespace vicinal::VICINAL_ISA {

template <class T>
constexpr int kTileLanes = kTileVectors * kLanes<T>;

// Columns first .. first + count - 1 of v (part 0) or u (part 1), at `at` in a packed row.
struct Segment {
  int32_t part, first, count, at;
};

struct Tile {
  Segment segment[2];
  int32_t lanes;  // of a packed row, a multiple of a vector

  int32_t segments() const { return segment[1].count > 0 ? 2 : 1; }
};

template <class S>
const S* row_in(const Matrix& m, int64_t b, int64_t n) {
  return static_cast<const S*>(m.data) + b * m.stride_b + n * m.stride_n;
}
template <class S>
S* row_to(const Matrix& m, int64_t b, int64_t n) {
  return static_cast<S*>(m.data) + b * m.stride_b + n * m.stride_n;
}

template <class S, class T>
inline Vec<T> load_lanes(const S* from, int32_t count) {
  return count >= kLanes<T> ? load_as(from) : load_part<T>(from, count);
}
template <class S, class T>
inline void store_lanes(S* to, Vec<T> x, int32_t count) {
  if (count >= kLanes<T>) {
    store_as(to, x);
  } else {
    store_part<T>(to, x, count);
  }
}

template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  constexpr T log2e = T(1.44269504088896340736);
  const Vec<T> e = exp2((x > Vec<T>{} ? -x : x) * log2e);  // of -|x|: no overflow
  return (x > Vec<T>{} ? splat(T(1)) : e) / (T(1) + e);
}

constexpr double kLaplaceMean = 0.70710678118654752440;   // sqrt(1/2)
constexpr double kLaplaceWidth = 0.39894228040143267794;  // sqrt(1 / (4 pi)) sqrt 2
constexpr double kLaplacePeak = 1.41421356237309504880;   // density at the mean: sqrt 2

inline float complement(float x) { return __builtin_erfcf(x); }
inline double complement(double x) { return __builtin_erfc(x); }

template <class T>
inline Vec<T> joint_weight(JointActivation activation, Vec<T> s) {
  if (activation == kJointRelu2) {
    const Vec<T> x = maximum(Vec<T>{}, s);
    return x * x;
  }
  Vec<T> result = {};
  const Vec<T> z = (T(kLaplaceMean) - s) * T(1 / kLaplaceWidth);
  for (int i = 0; i < kLanes<T>; ++i) result[i] = T(0.5) * complement(z[i]);
  return result;
}
template <class T>
inline Vec<T> joint_slope(JointActivation activation, Vec<T> s) {
  if (activation == kJointRelu2) return maximum(Vec<T>{}, s) * T(2);
  const Vec<T> z = (s - T(kLaplaceMean)) * T(1 / kLaplaceWidth);
  return exp2(z * z * T(-1.44269504088896340736)) * T(kLaplacePeak);
}

template <class S, class T>
struct JointBlock {
  static constexpr int kN = kLanes<T>;

  const Joint& a;
  const int32_t g, gp;  // most tokens of a group, and rounded up to whole vectors
  const int32_t d, dp;
  T *q, *k;           // quad_q times quad_scale and quad_k, [g][dp]
  T* k_columns;       // [dp][gp]
  T* weights;         // [g][gp]
  T* scores;          // [g][gp]; the memory of `weights` unless they are wanted
  T* bias = nullptr;  // [g][gp]
  // The group at work.
  int64_t b = 0, begin = 0;
  int32_t rows = 0;
  const uint8_t* ignored = nullptr;

  explicit JointBlock(const Joint& joint)
      : a(joint),
        g(static_cast<int32_t>(joint.group < joint.n ? joint.group : joint.n)),
        gp(round_up(g, kN)),
        d(joint.dim),
        dp(round_up(joint.dim, kN)) {}

  void carve(cpu::Arena& arena, bool keep_scores) {
    q = arena.take<T>(int64_t(g) * dp), k = arena.take<T>(int64_t(g) * dp);
    k_columns = arena.take<T>(int64_t(dp) * gp);
    weights = arena.take<T>(int64_t(g) * gp);
    scores = keep_scores ? arena.take<T>(int64_t(g) * gp) : weights;
    bias = a.bias ? arena.take<T>(int64_t(g) * gp) : nullptr;
  }
  void expand_bias() {  // after carve, when the memory is there
    for (int32_t i = 0; bias && i < g; ++i) {
      const T* from = static_cast<const T*>(a.bias) + int64_t(i) * a.group;
      for (int32_t j = 0; j < gp; ++j) bias[int64_t(i) * gp + j] = j < g ? from[j] : T(0);
    }
  }

  // Tiles of W: each has columns of v, and the same ones of u if there is a u.
  static int32_t tiles(const Joint& a) {
    const int32_t step = kTileLanes<T> * (a.u.data ? 1 : 2);
    return (a.dim_v + step - 1) / step;
  }
  static Tile tile(const Joint& a, int32_t index) {
    const int32_t step = kTileLanes<T> * (a.u.data ? 1 : 2), first = index * step;
    const int32_t left = a.dim_v - first, count = left < kTileLanes<T> ? left : kTileLanes<T>;
    Tile t;
    t.segment[0] = {0, first, count, 0};
    const int32_t at = round_up(count, kN);
    if (a.u.data) {
      t.segment[1] = {1, first, count, at};
    } else {
      const int32_t rest = left - count;
      t.segment[1] = {0, first + count, rest < kTileLanes<T> ? rest : kTileLanes<T>, at};
    }
    t.lanes = at + round_up(t.segment[1].count, kN);
    return t;
  }

  void set_group(int64_t batch, int64_t index) {
    b = batch, begin = index * a.group;
    rows = static_cast<int32_t>(a.n - begin < a.group ? a.n - begin : a.group);
    ignored = a.ignored ? a.ignored + b * a.n + begin : nullptr;
  }
  bool is_ignored(int32_t j) const { return ignored && ignored[j]; }

  // rows [count][dim] from token `first` on -> [count][dp] times factor, zeros for those that `skip` marks.
  void pack_rows(const Matrix& m, int64_t first, int32_t count, T factor, const uint8_t* skip, T* to) const {
    for (int32_t i = 0; i < count; ++i, to += dp) {
      const S* from = row_in<S>(m, b, first + i);
      for (int32_t c = 0; c < dp; c += kN) {
        const bool zero = skip && skip[i];
        store(to + c, zero ? Vec<T>{} : load_lanes<S, T>(from + c, d - c) * factor);
      }
    }
  }
  // Columns of W of `count` tokens -> [count][tile lanes].
  void pack_tile(const Tile& t, int64_t first, int32_t count, const uint8_t* skip, T* to) const {
    for (int32_t i = 0; i < count; ++i, to += t.lanes) {
      for (int32_t x = 0; x < t.segments(); ++x) {
        const Segment& s = t.segment[x];
        const S* from = row_in<S>(s.part ? a.u : a.v, b, first + i) + s.first;
        const bool zero = skip && skip[i];
        for (int32_t c = 0; c < s.count; c += kN)
          store(to + s.at + c, zero ? Vec<T>{} : load_lanes<S, T>(from + c, s.count - c));
      }
    }
  }
  // Columns of one state [dim][width] -> [dim][tile lanes].
  void pack_state(const T* state, const Tile& t, T* to) const {
    for (int32_t i = 0; i < d; ++i, to += t.lanes, state += a.width()) {
      for (int32_t x = 0; x < t.segments(); ++x) {
        const Segment& s = t.segment[x];
        const T* from = state + int64_t(s.part) * a.dim_v + s.first;
        for (int32_t c = 0; c < s.count; c += kN)
          store(to + s.at + c, load_lanes<T, T>(from + c, s.count - c));
      }
    }
  }
  void unpack_state(const T* from, const Tile& t, T factor, T* state) const {
    for (int32_t i = 0; i < d; ++i, from += t.lanes, state += a.width()) {
      for (int32_t x = 0; x < t.segments(); ++x) {
        const Segment& s = t.segment[x];
        T* to = state + int64_t(s.part) * a.dim_v + s.first;
        for (int32_t c = 0; c < s.count; c += kN)
          store_lanes<T, T>(to + c, load(from + s.at + c) * factor, s.count - c);
      }
    }
  }
  // [rows][columns] with columns a multiple of a vector and row stride `stride` -> [columns][to_stride];
  // rows beyond the last are 0.
  static void transposed(const T* from, int32_t rows, int32_t columns, int32_t stride, int32_t to_stride,
                         T* to) {
    for (int32_t i0 = 0; i0 < rows; i0 += kN) {
      for (int32_t c0 = 0; c0 < columns; c0 += kN) {
        Vec<T> r[kN];
#pragma GCC unroll 16
        for (int32_t x = 0; x < kN; ++x)
          r[x] = i0 + x < rows ? load(from + int64_t(i0 + x) * stride + c0) : Vec<T>{};
        transpose<T>(r);
#pragma GCC unroll 16
        for (int32_t x = 0; x < kN; ++x) store(to + int64_t(c0 + x) * to_stride + i0, r[x]);
      }
    }
  }

  // Queries, keys, scores and weights of the group.
  void make_weights() {
    pack_rows(a.quad_q, begin, rows, T(a.quad_scale), nullptr, q);
    pack_rows(a.quad_k, begin, rows, T(1), ignored, k);
    transposed(k, rows, dp, dp, gp, k_columns);
    const int32_t wide = round_up(rows, kN) / kN;
    gemm_rows(Gemm<T>{q, dp, k_columns, gp, bias, gp, scores, gp, nullptr}, rows, d, wide);
    for (int32_t i = 0; i < rows; ++i) {
      const T* from = scores + int64_t(i) * gp;
      T* to = weights + int64_t(i) * gp;
      for (int32_t j = 0; j < rows; j += kN) store(to + j, joint_weight<T>(a.activation, load(from + j)));
    }
    restrict_pairs(weights);
  }
  // Zero above the diagonal if causal; dropout.
  void restrict_pairs(T* x) const {
    for (int32_t i = 0; i < rows; ++i) {
      T* row = x + int64_t(i) * gp;
      if (a.dropout_p > 0) drop(row, i);
      for (int32_t j = i + 1; a.causal && j < rows; ++j) row[j] = 0;
    }
  }
  void drop(T* row, int32_t i) const {
    const uint32_t limit = dropout_threshold(a.dropout_p);
    const T kept = T(1 / (1 - a.dropout_p));
    const uint64_t seed = static_cast<uint64_t>(*a.seed);
    for (int32_t j = 0; j < rows; j += 4) {
      const Philox4 w = dropout_words(seed, static_cast<uint32_t>(j / 4), static_cast<uint32_t>(begin + i),
                                      static_cast<uint32_t>(b));
      for (int32_t x = 0; x < 4 && j + x < rows; ++x) row[j + x] *= w.x[x] >= limit ? kept : T(0);
    }
  }
};

}  // namespace vicinal::VICINAL_ISA
