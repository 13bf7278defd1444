// The launches that linear attention is made of; linear.cu puts them together.
#pragma once

#include "linear.cuh"

namespace vicinal::cuda {

// Sums of runs: S = sum_j w_j left_j right_j^T and z = sum_j w_j (d_j) left_den_j, with w_j the decay between
// token j and the run's end (keys) or start (queries); and exp of the run's decay.
struct LinearSums {
  Linear a;
  LinearRuns runs;
  TokenNumbers numbers;
  Operand left, right, left_den;         // left_den: of z where its features differ
  States to;                             // runs are written
  float* keep;                           // [slots, heads], or null
  int32_t k_slices, v_slices, z_slices;  // z_slices: blocks of their own, 0 where z is of `left`
  bool queries;
};

// What is computed for each row of a tile: rows are queries in all but kRowsDk and kRowsDv.
//   kRowsOut   out and den, or with `dots` num . r
//   kRowsDq    gradients of features of queries, times their slope; kRowsDk of keys
//   kRowsDv    gradients of values
enum RowsRole : int32_t { kRowsOut, kRowsDq, kRowsDk, kRowsDv };

// y_i = w_i left_i . sums + sum_j D_ij (left_i . right_j + d) column_j over the j of the run that i sees
// (that see i), with d of the query of the two.
struct LinearRows {
  Linear a;
  LinearRuns runs;
  Scope scope;
  RowsRole role;
  States states;
  TokenNumbers numbers;
  Operand left, right, column, own;  // own: whose gradient is written, or dout of `dots`
  Operand left_den, right_den;       // of the denominator, where its features differ
  Strided to;
  float *den, *dots;                 // written: den [B, heads, n_q]; parts of num . r
  float *overlaps, *state_overlaps;  // f . df or p . dp [parts, B, heads, n]; its part from sums
  int32_t tiles, slices, group;      // group: heads whose gradients a block adds up
  bool product, slopes;              // left . right and sums; d
  bool pairs;                        // rows that are written are aligned to two elements
};

// In the order of the slots of a sequence (or backwards): every run's sums become those before it, from the
// initial ones on; `last` and `copy` get what is left at the end.
struct LinearScan {
  LinearRuns runs;
  States states;
  const float *keep, *initial_s, *initial_z;
  float *last_s, *last_z, *copy_s, *copy_z;  // or null
  bool backwards, write;
};

// ddecay of the tokens of a run. With h the sums before the run, dh the gradient behind it, and p . dp = what
// comes from the run + s_j from dh: the sum of f . df - p . dp from a token on, plus <h', dh> of the sums h'
// behind the run, in which the s_j from the token on cancel and do so here before anything is rounded:
//   ddecay_i = sum over j >= i of (f . df - p . dp + s)_j + sum over j < i of s_j + exp(b_N) <h, dh>
struct LinearDecayGrad {
  Linear a;
  LinearRuns runs;
  States states, grads;
  const float *keep, *of_queries, *of_keys, *of_states;  // of_*: [parts, B, heads, n]
  int32_t parts;
  float* ddecay;
};

// Tokens that belong to no sequence get `value`.
struct LinearRest {
  Strided x;
  DType dtype;
  const int32_t* cu_seqlens;
  int64_t sequences, tokens;
  int32_t heads, dim;
  float value;
};

constexpr int kRunTokens = kRunTiles * kSide;
// Runs of at least kRunTokens tokens, of longer sequences 32 or less.
inline int long_run(int64_t tokens) { return std::max(kRunTokens, round_up(ceil_div(tokens, 32), kSide)); }

cudaError_t launch_scan(const LinearScan& p, cudaStream_t stream);
cudaError_t launch_rest(const LinearRest& p, cudaStream_t stream);
cudaError_t launch_decay_grad(const LinearDecayGrad& p, cudaStream_t stream);
// T: bf16, tf32, float. Instances live in linear_sums.cu and linear_rows.cu.
template <class T>
cudaError_t launch_sums(const LinearSums& p, cudaStream_t stream);
template <class T>
cudaError_t launch_rows(const LinearRows& p, cudaStream_t stream);

}  // namespace vicinal::cuda
