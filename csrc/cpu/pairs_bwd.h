// The backward of a block (attend_bwd.cpp) in products of pairs. W is the Backward of bfloat16.
//
// After it, ds holds dS as pairs of keys, w.ds_rows [k_most][kBlockQueries / 2] as pairs of queries, and s
// the weights as pairs of queries, in rows of kBlockQueries floats whose first half is used.
#pragma once
#include "pairs.h"

namespace vicinal::VICINAL_ISA {
#if defined(__AVX512BF16__)

// Two rounded vectors as elements c .. c + 15 of the rows `low` and, if there is one, `high`.
inline void store_rounded(float* low, float* high, int32_t c, __m512bh two) {
  const __m512i x = (__m512i)two;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + c / 2), _mm512_castsi512_si256(x));
  if (high) _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + c / 2), _mm512_extracti64x4_epi64(x, 1));
}

// A vector of queries: weights and gradients of the scores, rounded; the latter are added to bias_sum before.
template <class W>
[[gnu::noinline]] void pair_gradients(W& w, int32_t c, float* bias_sum) {
  constexpr int64_t row = kBlockQueries;
  const int32_t nk = w.now->nk, stride = w.q_most;
  const Vec<float> l = load(w.lse + c);
  Vec<float> total = {}, delta = {};
  for (int32_t j = 0; j < nk; ++j) {
    float* x = w.s + j * row + c;
    const Vec<float> weight = exp2(load(x) - l);
    total += weight;
    delta += weight * load(w.ds + j * row + c);
    store(x, weight);
  }
  const Vec<float> inverse = total == Vec<float>{} ? Vec<float>{} : 1.0f / total;
  delta = delta * inverse - load(w.dlse + c);
  for (int32_t j = 0; j < nk; j += 2) {
    Vec<float> weight[2] = {}, gradient[2] = {};
    const int32_t count = j + 1 < nk ? 2 : 1;
    for (int32_t u = 0; u < count; ++u) {
      weight[u] = load(w.s + (j + u) * row + c) * inverse;
      gradient[u] = weight[u] * (load(w.ds + (j + u) * row + c) - delta);
      float* sum = bias_sum + int64_t(j + u) * stride + c;
      if (bias_sum) store(sum, load(sum) + gradient[u]);
    }
    const __m512bh rounded = round_two(gradient[0], gradient[1]);
    float *s = w.s + j * row, *rows = w.ds_rows + j * (row / 2);
    store_rounded(s, count == 2 ? s + row : nullptr, c, round_two(weight[0], weight[1]));
    store_rounded(rows, count == 2 ? rows + row / 2 : nullptr, c, rounded);
    store_pairs(w.ds + j / 2 * row + c, interleave(rounded));
  }
}

// Element c of every row of rounded elements, from a column in pairs; an even one clears the element after
// it, so that a missing partner is 0.
inline void scatter_rounded(const float* column, int32_t count, int32_t c, float* to, int64_t stride) {
  for (int32_t j = 0; j < count; ++j) {
    BFloat16 pair[2] = {{0}, {0}};
    __builtin_memcpy(pair, reinterpret_cast<const char*>(column) + 2 * j, 2);
    __builtin_memcpy(reinterpret_cast<BFloat16*>(to + j * stride) + c, pair, c % 2 ? 2 : 4);
  }
}

// The same for one query: its keys become the lanes.
template <class W>
[[gnu::noinline]] void pair_tail_gradients(W& w, int32_t c, float* bias_sum) {
  constexpr int64_t row = kBlockQueries;
  const int32_t nk = w.now->nk, padded = round_up(nk, 16);
  float *weights = w.column, *gradients = w.column2;
  for (int32_t j = 0; j < nk; ++j) weights[j] = w.s[j * row + c], gradients[j] = w.ds[j * row + c];
  for (int32_t j = nk; j < padded; ++j) weights[j] = -__builtin_inff(), gradients[j] = 0;
  Vec<float> sum = {}, total = {};
  for (int32_t j = 0; j < padded; j += 16) {
    const Vec<float> weight = exp2(load(weights + j) - w.lse[c]);
    sum += weight * load(gradients + j), total += weight;
    store(weights + j, weight);
  }
  const float all = sum_lanes<float>(total), inverse = all == 0 ? 0 : 1 / all;
  const float delta = sum_lanes<float>(sum) * inverse - w.dlse[c];
  for (int32_t j = 0; j < padded; j += 16) {
    const Vec<float> weight = load(weights + j) * inverse;
    store(weights + j, weight), store(gradients + j, weight * (load(gradients + j) - delta));
  }
  for (int32_t j = 0; bias_sum && j < nk; ++j) bias_sum[int64_t(j) * w.q_most + c] += gradients[j];
  pair_column(weights, padded), pair_column(gradients, padded);
  scatter_rounded(weights, nk, c, w.s, row);
  scatter_rounded(gradients, nk, c, w.ds_rows, row / 2);
  for (int32_t j = 0; j < (nk + 1) / 2; ++j) w.ds[j * row + c] = gradients[j];
}

// True if dk and dv are where they belong.
template <class W>
bool pair_block(W& w, int32_t h) {
  constexpr int64_t row = kBlockQueries;
  const int32_t nk = w.now->nk, n = w.n, q0 = w.q0;
  pair_scores(w, h);
  transpose_pairs(w.here->dout + q0, n, w.vectors, w.Dv, w.dout, row);
  PairGemm dp{w.here->v, nullptr, 0, w.dout, row, 1, nullptr, 0, w.ds, row};
  dp.ahead = &w.ahead;
  pair_rows(dp, nk, w.Dv / 2, w.vectors);
  for (int32_t u = 0; u < w.tails; ++u) {
    const int32_t c = w.column_of_tail(u);
    pair_dots(w.here->v, nk, w.Dv, w.here->dout[q0 + c], 1, nullptr, 0, w.ds + c, row);
  }
  w.load_sums(h);
  float* bias_sum = w.dbias ? w.dbias + (h - w.bias_heads_begin) * w.bias_stride() + q0 : nullptr;
  for (int32_t c = 0; c < w.vectors * 16; c += 16) pair_gradients(w, c, bias_sum);
  for (int32_t u = 0; u < w.tails; ++u) pair_tail_gradients(w, w.column_of_tail(u), bias_sum);

  interleave_rows(w.here->q + q0, n, w.D, w.Dp, w.q_rows);
  interleave_rows(w.here->dout + q0, n, w.Dv, w.Dvp, w.dout_rows);
  w.find_query_factors(h);
  PairGemm to_q{nullptr, w.ds, row, w.k, w.Dp, 1, nullptr, 0, nullptr, 0};
  to_q.c_rows = w.here->to_q + q0, to_q.c_factor = w.q_factor, to_q.c_width = w.D, to_q.ahead = &w.ahead;
  pair_columns(to_q, n, (nk + 1) / 2, w.Dp / 16);
  const bool at_once = !w.now->k_special && n == w.now->nq;
  PairGemm to_k{nullptr, w.ds_rows, row / 2, w.q_rows, w.Dp, 1, q0 ? w.dk : nullptr, w.Dp, w.dk, w.Dp};
  PairGemm to_v{nullptr, w.s, row, w.dout_rows, w.Dvp, 1, q0 ? w.dv : nullptr, w.Dvp, w.dv, w.Dvp};
  to_k.ahead = to_v.ahead = &w.ahead;
  if (at_once) {
    to_k.c_rows = w.here->to_k, to_k.c_factor = w.k_factor, to_k.c_width = w.D;
    to_v.c_rows = w.here->to_v, to_v.c_width = w.Dv;
  }
  pair_rows(to_k, nk, (n + 1) / 2, w.Dp / 16);
  pair_rows(to_v, nk, (n + 1) / 2, w.Dvp / 16);
  return at_once;
}

#endif
}  // namespace vicinal::VICINAL_ISA
