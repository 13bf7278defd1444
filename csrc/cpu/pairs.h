// Products of bfloat16 pairs (VDPBF16PS: C += a0 * b0 + a1 * b1, float sums, twice the multiply-adds of
// float).
//
// A row of bfloat16 in memory is already pairs along the head dimension, so scores read K and V in place.
// Products over keys or queries take operands whose rows were interleaved two by two, and weights (or their
// gradients) rounded to bfloat16, as dense PyTorch rounds them.
#pragma once
#include "block.h"

namespace vicinal::VICINAL_ISA {

#if defined(__AVX512BF16__)
template <class S>
constexpr bool kHasPairs = std::is_same_v<S, BFloat16>;
#else
template <class S>
constexpr bool kHasPairs = false;
#endif

// C[i][lanes] = factor * (sum over t of A[i][t] . B[t][lanes]) + add[i][lanes], t counting pairs.
struct PairGemm {
  const BFloat16* const* a_rows;  // or null
  const float* a;                 // pairs, seen as floats; stride: between rows, or between steps of columns
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float factor;
  const float* add;  // or null; may be c
  int64_t add_stride;
  float* c;
  int64_t c_stride;
  BFloat16* const* c_rows = nullptr;  // row i of C, instead of c + i * c_stride: c_width elements are written
  const float* c_factor = nullptr;    // or what row i of C is multiplied by, instead of factor
  int32_t c_width = 0;
  const Ahead* ahead = nullptr;
};

// As gemm_rows and gemm_columns: m rows, n pairs, `vectors` vectors of lanes.
void pair_rows(const PairGemm& g, int m, int n, int vectors);
void pair_columns(const PairGemm& g, int m, int n, int vectors);

#if defined(__AVX512BF16__)

// The first d (at most 32) elements of a row; the others are 0.
inline __m512i load_pairs(const BFloat16* row, int32_t d) {
  if (d >= 32) return _mm512_loadu_si512(row);
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << d) - 1u), row);
}
inline void store_pairs(float* to, __m512i x) { _mm512_storeu_si512(to, x); }

// Pairs (low[i], high[i]) of two vectors, rounded.
inline __m512bh round_two(Vec<float> low, Vec<float> high) { return _mm512_cvtne2ps_pbh(high, low); }
inline __m512i interleave(__m512bh two) {
  static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), (__m512i)two);
}

// Rows 2 u and 2 u + 1 of [count][d] -> pairs to[u][dp]; a missing last row is 0.
inline void interleave_rows(const BFloat16* const* rows, int32_t count, int32_t d, int32_t dp, float* to) {
  const __m512i low = interleave((__m512bh)_mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)),
      _mm256_set_epi16(47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36, 35, 34, 33, 32), 1));
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int32_t i = 0; i < count; i += 2, to += dp) {
    for (int32_t at = 0; at < d; at += 32) {
      const __m512i a = load_pairs(rows[i] + at, d - at);
      const __m512i b = i + 1 < count ? load_pairs(rows[i + 1] + at, d - at) : __m512i{};
      store_pairs(to + at, _mm512_permutex2var_epi16(a, low, b));
      if (at + 16 < dp) store_pairs(to + at + 16, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// Rows [count][d], d even -> columns of pairs to[d / 2][stride], for `vectors` vectors of rows; the missing
// rows are 0.
inline void transpose_pairs(const BFloat16* const* rows, int32_t count, int32_t vectors, int32_t d, float* to,
                            int64_t stride) {
  for (int32_t i0 = 0; i0 < vectors * 16; i0 += 16) {
    for (int32_t at = 0; at < d; at += 32) {
      Vec<float> r[16];
#pragma GCC unroll 16
      for (int32_t u = 0; u < 16; ++u)
        r[u] = i0 + u < count ? (Vec<float>)load_pairs(rows[i0 + u] + at, d - at) : Vec<float>{};
      transpose<float>(r);
      const int32_t wide = (d - at) / 2 < 16 ? (d - at) / 2 : 16;
#pragma GCC unroll 16
      for (int32_t u = 0; u < 16; ++u) {
        if (u < wide) store(to + (at / 2 + u) * stride + i0, r[u]);
      }
    }
  }
}

// to[j * stride] = factor * (row j . x) + add[j * add_stride]. rows: whole vectors of 16, zeros after count.
inline void pair_dots(const BFloat16* const* rows, int32_t count, int32_t d, const BFloat16* x, float factor,
                      const float* add, int64_t add_stride, float* to, int64_t stride) {
  for (int32_t j0 = 0; j0 < count; j0 += 16) {
    Vec<float> r[16];
#pragma GCC unroll 16
    for (int32_t u = 0; u < 16; ++u) {
      r[u] = Vec<float>{};
      for (int32_t at = 0; at < d; at += 32) {
        r[u] = _mm512_dpbf16_ps(r[u], (__m512bh)load_pairs(rows[j0 + u] + at, d - at),
                                (__m512bh)load_pairs(x + at, d - at));
      }
    }
    const Vec<float> sums = sum_each<float>(r) * factor;
    for (int32_t u = 0; u < 16 && j0 + u < count; ++u)
      to[(j0 + u) * stride] = sums[u] + (add ? add[(j0 + u) * add_stride] : 0.0f);
  }
}

// What a call needs for products of pairs; the others compute in float.
template <class S>
bool can_pair(const Attend& a) {
  if (a.rel) return false;
  return kHasPairs<S> && a.activation == kSoftmax && !a.q_scale && !a.k_scale && a.dropout_p == 0 &&
         a.head_dim % 2 == 0;
}

// S of a block (block.h), complete with every term.
template <class W>
void pair_scores(W& w, int32_t h) {
  const float factor = static_cast<float>(w.a.scale) * w.unit;
  const float* init = w.bias ? w.bias_of(h) + w.q0 : nullptr;
  transpose_pairs(w.here->q + w.q0, w.n, w.vectors, w.D, w.q, kBlockQueries);
  PairGemm g{w.here->k, nullptr, 0, w.q, kBlockQueries, factor, init, w.q_most, w.s, kBlockQueries};
  g.ahead = &w.ahead;
  pair_rows(g, w.now->nk, w.D / 2, w.vectors);
  for (int32_t u = 0; u < w.tails; ++u) {
    const int32_t c = w.column_of_tail(u);
    pair_dots(w.here->k, w.now->nk, w.D, w.here->q[w.q0 + c], factor, init ? init + c : nullptr, w.q_most,
              w.s + c, kBlockQueries);
  }
  if (w.now->regions || w.now->key_terms || w.a.mask) w.add_terms(h);
}

// A column of n floats, zeros up to a whole number of vectors -> n / 2 pairs in its place.
inline void pair_column(float* column, int32_t n) {
  for (int32_t j = 0; j < n; j += 32) {
    const Vec<float> high = j + 16 < n ? load(column + j + 16) : Vec<float>{};
    store_pairs(column + j / 2, (__m512i)round_two(load(column + j), high));
  }
}

#else

template <class S>
bool can_pair(const Attend&) {
  return false;
}

#endif

}  // namespace vicinal::VICINAL_ISA
