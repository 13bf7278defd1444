// Products with lanes = head dimension: dot products of one row with scattered rows, and their weighted sum.
//
// kLanes dot products are added up by one tree of in-register transposes: for 16 of them 15 additions, 18
// blends and 14 shuffles, where heads of 32 have 32 multiply-adds. Measured on Zen 5, cycles for 16 products
// of 16, 32 and 64 dimensions: 23, 32, 55. Tried and slower: two shuffles a step and no blends (32, 40, 71);
// four centres by four columns in a tree, so that a row is loaded once for all four (no gain: loads are not
// what limits it); four dimensions of four centres as lanes, rows broadcast 128 bits at a time (1.4 times the
// time of the tree: such a load takes a cycle).
#pragma once
#include "simd.h"

namespace vicinal::VICINAL_ISA {

template <class T, class Lane, int... I>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, Lane, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, Lane::of(I)...);
}
template <class T, class Lane>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b) {
  return shuffle<T>(a, b, Lane(), std::make_integer_sequence<int, kLanes<T>>());
}
// Lanes 0 .. kLanes - 1 are those of a, then come those of b.
template <class T, int kUnit>
struct TakeTurns {
  static constexpr int of(int i) { return i / kUnit % 2 ? kLanes<T> + i : i; }
};
// Units of a and b in turns. Blends go to any port: with them a step of the tree has one true shuffle.
template <class T, int kUnit>
inline Vec<T> blend(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  constexpr int mask = kUnit == 1 ? 0xaaaa : kUnit == 2 ? 0xcccc : kUnit == 4 ? 0xf0f0 : 0xff00;
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(mask), a, b);
  } else {
    return _mm512_mask_blend_pd(static_cast<__mmask8>(mask), a, b);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return _mm256_blend_ps(a, b, kUnit == 1 ? 0xaa : kUnit == 2 ? 0xcc : 0xf0);
  } else {
    return _mm256_blend_pd(a, b, kUnit == 1 ? 0xa : 0xc);
  }
#else
  return shuffle<T, TakeTurns<T, kUnit>>(a, b);
#endif
}
template <int kUnit>  // neighbouring units swapped
struct Swapped {
  static constexpr int of(int i) { return i ^ kUnit; }
};
template <class T, int kGroup>  // crosswise: the upper half of a, then the lower half of b
struct Crossed {
  static constexpr int of(int i) { return i ^ kGroup / 2 ^ (i & kGroup / 2 ? kLanes<T> : 0); }
};

// In each group of lanes: the halves of a added up, then those of b.
template <class T, int kGroup>
inline Vec<T> add_halves(Vec<T> a, Vec<T> b) {
  return blend<T, kGroup / 2>(a, b) + shuffle<T, Crossed<T, kGroup>>(a, b);
}
// Pairs of neighbouring units added up, those of a and of b in turns.
template <class T, int kUnit>
inline Vec<T> add_pairs(Vec<T> a, Vec<T> b) {
  const Vec<T> rest = blend<T, kUnit>(b, a);
  return blend<T, kUnit>(a, b) + shuffle<T, Swapped<kUnit>>(rest, rest);
}
// Lane i of the result is the sum of the lanes of leaf(i), for i < count; count > 0.
template <class T, class Leaf>
[[gnu::always_inline]] inline Vec<T> sum_tree(const Leaf& leaf, int count) {
  constexpr int n = kLanes<T>, block = 16 / sizeof(T), blocks = n / block;
  const auto within = [&](int i) __attribute__((always_inline)) {  // leaves of one 128-bit block
    if (i >= count) return Vec<T>{};
    if constexpr (block == 2) {
      return add_halves<T, 2>(leaf(i), leaf(i + 1));
    } else {
      const Vec<T> even = add_halves<T, 4>(leaf(i), leaf(i + 2));
      return add_pairs<T, 1>(even, add_halves<T, 4>(leaf(i + 1), leaf(i + 3)));
    }
  };
  if constexpr (blocks == 1) {
    return within(0);
  } else if constexpr (blocks == 2) {
    return add_halves<T, n>(within(0), within(block));
  } else {
    const Vec<T> even = add_halves<T, n>(within(0), within(2 * block));
    return add_pairs<T, block>(even, add_halves<T, n>(within(block), within(3 * block)));
  }
}

template <class T, int kStage = VectorOf<T>::kLogLanes, class Op, int... I>
inline Vec<T> across(Vec<T> x, const Op& op, std::integer_sequence<int, I...> lanes) {
  if constexpr (kStage == 0) {
    return x;
  } else {
    const Vec<T> y = __builtin_shufflevector(x, x, (I ^ (1 << (kStage - 1)))...);
    return across<T, kStage - 1>(op(x, y), op, lanes);
  }
}
// The sum and the maximum of the lanes of x, in all lanes.
template <class T>
inline Vec<T> sum_across(Vec<T> x) {
  const auto op = [](Vec<T> a, Vec<T> b) { return a + b; };
  return across<T>(x, op, std::make_integer_sequence<int, kLanes<T>>());
}
template <class T>
inline Vec<T> most_across(Vec<T> x) {
  const auto op = [](Vec<T> a, Vec<T> b) { return maximum(a, b); };
  return across<T>(x, op, std::make_integer_sequence<int, kLanes<T>>());
}

// out[i] = factor * x . rows[at[i]] (kAdd: + out[i]) for i < count, rows of kVectors vectors. at is readable,
// and out written, up to a whole vector.
template <class T, int kVectors, bool kAdd>
void dots_of(const T* x, const T* rows, const int32_t* at, int32_t count, T factor, T* out) {
  constexpr int n = kLanes<T>;
  Vec<T> xv[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) xv[v] = load(x + v * n);
  const auto leaves = [&](const int32_t* from) __attribute__((always_inline)) {
    return [&xv, from, rows](int u) __attribute__((always_inline)) {
      const T* y = rows + from[u];
      Vec<T> r = load(y) * xv[0];
#pragma GCC unroll 8
      for (int v = 1; v < kVectors; ++v) r += load(y + v * n) * xv[v];
      return r;
    };
  };
  int32_t i = 0;
  for (; i + n <= count; i += n) {
    Vec<T> sums = sum_tree<T>(leaves(at + i), n) * factor;
    if constexpr (kAdd) sums += load(out + i);
    store(out + i, sums);
  }
  if (i == count) return;
  Vec<T> sums = sum_tree<T>(leaves(at + i), count - i) * factor;
  if constexpr (kAdd) sums += load(out + i);
  store(out + i, sums);
}
template <class T, bool kAdd, int kVectors = 8>
void dots_upto(int vectors, const T* x, const T* rows, const int32_t* at, int32_t count, T factor, T* out) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return dots_upto<T, kAdd, kVectors - 1>(vectors, x, rows, at, count, factor, out);
  }
  dots_of<T, kVectors, kAdd>(x, rows, at, count, factor, out);
}
template <class T>
void dots(int vectors, const T* x, const T* rows, const int32_t* at, int32_t count, T factor, T* out) {
  dots_upto<T, false>(vectors < 8 ? vectors : 8, x, rows, at, count, factor, out);
  while ((vectors -= 8) > 0) {
    x += 8 * kLanes<T>, rows += 8 * kLanes<T>;
    dots_upto<T, true>(vectors < 8 ? vectors : 8, x, rows, at, count, factor, out);
  }
}

// Vectors of a row that are weighed at once, so that four accumulators of each fit the registers.
#if defined(__AVX512F__)
constexpr int kWeighed = 4;
#else
constexpr int kWeighed = 2;
#endif

// out += the sum over i < count of w[i] * rows[at[i]].
template <class T, int kVectors>
void weigh_of(const T* w, const T* rows, const int32_t* at, int32_t count, T* out) {
  constexpr int n = kLanes<T>, chains = 4;
  Vec<T> acc[chains][kVectors] = {};
  int32_t i = 0;
  for (; i + chains <= count; i += chains) {
#pragma GCC unroll 4
    for (int u = 0; u < chains; ++u) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[u][v] += load(rows + at[i + u] + v * n) * w[i + u];
    }
  }
  for (; i < count; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[0][v] += load(rows + at[i] + v * n) * w[i];
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v)
    store(out + v * n, load(out + v * n) + ((acc[0][v] + acc[1][v]) + (acc[2][v] + acc[3][v])));
}
template <class T, int kVectors = kWeighed>
void weigh_upto(int vectors, const T* w, const T* rows, const int32_t* at, int32_t count, T* out) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return weigh_upto<T, kVectors - 1>(vectors, w, rows, at, count, out);
  }
  weigh_of<T, kVectors>(w, rows, at, count, out);
}
template <class T>
void weigh(int vectors, const T* w, const T* rows, const int32_t* at, int32_t count, T* out) {
  constexpr int step = kWeighed * kLanes<T>;
  for (; vectors > 0; vectors -= kWeighed, rows += step, out += step)
    weigh_upto<T>(vectors < kWeighed ? vectors : kWeighed, w, rows, at, count, out);
}

constexpr int kBand = 4;

// The boxes of kBand centres, `lines` lines of `width` rows each: those of centre u begin kStep * u rows
// after those of centre 0. What belongs to a box (weights, products) is contiguous.
template <class T>
struct Band {
  const T* rows;  // the first row of centre 0
  int32_t row_stride, line_stride;
  int32_t lines, width;
};

// out[u] += the sum over the box of centre u of w[u][slot] * row: each row is loaded once for all
// centres that read it.
template <class T, int kStep, int kVectors>
void weigh_band_of(const Band<T>& g, const T* weights, int64_t w_stride, T* out, int64_t out_stride) {
  constexpr int n = kLanes<T>;
  Vec<T> acc[kBand][kVectors];
#pragma GCC unroll 4
  for (int u = 0; u < kBand; ++u) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[u][v] = load(out + u * out_stride + v * n);
  }
  const T* w[kBand];
  for (int u = 0; u < kBand; ++u) w[u] = weights + u * w_stride - kStep * u;
  const int64_t stride = g.row_stride;
  const auto column = [&](const T* y, int64_t c, int first, int last) __attribute__((always_inline)) {
    Vec<T> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(y + c * stride + v * n);
#pragma GCC unroll 4
    for (int u = 0; u < kBand; ++u) {
      if (u < first || u > last) continue;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[u][v] += row[v] * w[u][c];
    }
  };
  for (int32_t line = 0; line < g.lines; ++line) {
    const T* y = g.rows + int64_t(line) * g.line_stride;
    int64_t c = 0;
    if constexpr (kStep == 1) {
      column(y, 0, 0, 0), column(y, 1, 0, 1), column(y, 2, 0, 2);
      c = 3;
    }
    for (; c < g.width; ++c) column(y, c, 0, 3);
    if constexpr (kStep == 1) column(y, c, 1, 3), column(y, c + 1, 2, 3), column(y, c + 2, 3, 3);
#pragma GCC unroll 4
    for (int u = 0; u < kBand; ++u) w[u] += g.width;
  }
#pragma GCC unroll 4
  for (int u = 0; u < kBand; ++u) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + u * out_stride + v * n, acc[u][v]);
  }
}
template <class T, int kStep, int kVectors = kWeighed>
void weigh_band_upto(int vectors, const Band<T>& g, const T* w, int64_t w_stride, T* out,
                     int64_t out_stride) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) {
      return weigh_band_upto<T, kStep, kVectors - 1>(vectors, g, w, w_stride, out, out_stride);
    }
  }
  weigh_band_of<T, kStep, kVectors>(g, w, w_stride, out, out_stride);
}
// step: 0, or 1 where width is at least kBand - 1.
template <class T>
void weigh_band(int vectors, int step, Band<T> g, const T* w, int64_t w_stride, T* out, int64_t out_stride) {
  constexpr int wide = kWeighed * kLanes<T>;
  for (; vectors > 0; vectors -= kWeighed, g.rows += wide, out += wide) {
    const int some = vectors < kWeighed ? vectors : kWeighed;
    step ? weigh_band_upto<T, 1>(some, g, w, w_stride, out, out_stride)
         : weigh_band_upto<T, 0>(some, g, w, w_stride, out, out_stride);
  }
}

}  // namespace vicinal::VICINAL_ISA
