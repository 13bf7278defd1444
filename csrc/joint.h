// joint attention: groups of tokens attend to each other without a normaliser, and every token reads a linear
// memory of all (causal: of the earlier groups') tokens. Queries and keys have one head; the values are the
// columns of v and then those of u, treated as one wide matrix W.
//
//   s(i, j) = quad_scale * quad_q_i . quad_k_j + bias[i % group][j % group]      i, j in one group
//   A(i, j) = act(s) * keep / (1 - dropout_p); 0 where j is ignored, or causal and j > i
//   state   = sum_j lin_k_j W_j^T          over all tokens; causal: over the groups before that of i
//   O_i     = sum_j A(i, j) W_j + lin_scale * lin_q_i state
//   act: relu(s)^2, or (1 + erf((s - mu) / (sd sqrt 2))) / 2 with mu = sqrt(1/2), sd = sqrt(1 / (4 pi))
//
// An ignored key takes no part in either sum, and what it holds is not read there. Without a gate the results
// are the columns of O; with one, t = sigmoid(O_v u) and out = O_u v t, elementwise.
// keep comes from philox.h at (j % group, i, b).
//
// Plain data only, as attend.h. "acc" is float, or double when dtype is F64.
#pragma once
#include "attend.h"

namespace vicinal {

enum JointActivation : int32_t { kJointRelu2 = 0, kJointLaplace = 1 };

// A tensor [B, N, D] with D contiguous.
struct Matrix {
  void* data;
  int64_t stride_b, stride_n;
};

// Null pointers switch an option off.
struct Joint {
  DType dtype;
  JointActivation activation;
  int64_t batch, n, group;
  int32_t dim, dim_v;    // of queries and keys; of v, and of u
  int32_t causal, gate;  // gate: u is there
  Matrix quad_q, quad_k, lin_q, lin_k, v, u;
  double quad_scale, lin_scale, dropout_p;
  const void* bias;        // acc [group, group]
  const uint8_t* ignored;  // [B, n]
  const int64_t* seed;     // one element

  int64_t groups() const { return (n + group - 1) / group; }
  int64_t states() const { return causal ? groups() : 1; }  // of a sample
  int64_t width() const { return int64_t(dim_v) * (u.data ? 2 : 1); }
};

// Without a gate: `out` gets the columns of v, `other` those of u. With one: `out` is the result, and
// inner_v, inner_u are O_v and O_u, which the backward needs (null: not wanted).
struct JointFwd {
  Joint a;
  Matrix out, other, inner_v, inner_u;
  void* state;  // acc [B, states, dim, width]
};

// dout and dother belong to `out` and `other`; null is zero.
struct JointBwd {
  Joint a;
  Matrix inner_v, inner_u, dout, dother;
  const void* state;
  void* dstate;  // scratch, like state
  Matrix dquad_q, dquad_k, dlin_q, dlin_k, dv, du;
  void* dbias;  // acc [group, group], or null
};

namespace cpu {
void joint_fwd(const JointFwd& p, int threads);
void joint_bwd(const JointBwd& p, int threads);
}  // namespace cpu
// A cudaError_t; workspace: as many bytes as asked for.
namespace cuda {
int64_t joint_fwd_workspace(const JointFwd& p);
int64_t joint_bwd_workspace(const JointBwd& p);
int joint_fwd(const JointFwd& p, void* workspace, void* stream);
int joint_bwd(const JointBwd& p, void* workspace, void* stream);
}  // namespace cuda

}  // namespace vicinal
