// What the launches of joint attention share (csrc/joint.h has the formula). The weights of a group are made
// once, in tiles of 64 x 64, and kept in the workspace in the type that products take: 2048 columns of values
// would make them 16 times otherwise. Everything else is a sum of products of tiles.
#pragma once

#include "../joint.h"
#include "linear_kernels.cuh"

namespace vicinal::cuda {

template <class T>
constexpr DType kStored = std::is_same_v<T, bf16> ? kBF16 : kF32;  // of weights in memory

// Weights [B, n, group], and where `slopes` is there the gradients of scores, from those of the results.
struct JointScores {
  Joint a;
  Operand quad_q, quad_k;
  Operand dout[2], values[2];  // null data: none
  void *weights, *slopes;
  int32_t tiles;  // of a group
};

enum JointRole : int32_t { kJointOut, kJointValues, kJointPlain };

// y_i = sum over the tokens j of the group of pairs_ij (or pairs_ji) column_j
//       + sum over k of left_k,i state, or state^T: for columns of v and, if they are there, of u at once.
struct JointRows {
  Joint a;
  JointRole role;
  Operand pairs, columns[2];  // null data: none
  Operand left[2];            // by_values: of the columns of v and u; otherwise the first alone
  const float* state;         // [B, states, dim, width]
  bool transposed, by_values;
  float factor;
  Strided to[2];
  Strided out, inner[2];         // of a gate: the result (or its gradient), O_v and O_u
  int32_t tiles, slices, width;  // width: columns of a result
  bool pairs_of_columns;         // results are aligned to two elements
};

struct JointState {
  Joint a;
  LinearRuns runs;
  const float* sums[2];  // of runs, of the columns of v and of u
  float* state;
  float factor;
  bool backwards;
};

// Gradients of O_v and O_u from that of a gated result.
struct JointGate {
  Joint a;
  Matrix inner_v, inner_u, dout;
  void* to[2];  // [B, n, dim_v] each
  DType dtype;
};

struct JointBias {
  Joint a;
  const void* slopes;
  DType dtype;
  float* dbias;
};

// Values of a gate: t = sigmoid(O_v u), and the gradient of its argument.
struct Gate {
  float v, u, of_v, of_u, t;
  __device__ Gate(float value, float gate, float inner_v, float inner_u)
      : v(value),
        u(gate),
        of_v(inner_v),
        of_u(inner_u),
        t(1.0f / (1.0f + simt::ex2(-inner_v * gate * kLog2E))) {}
  __device__ float slope(float dy) const { return dy * of_u * v * t * (1.0f - t); }
};

__device__ inline float load_matrix(const Matrix& m, DType dtype, int64_t batch, int64_t token, int col) {
  return load_value(m.data, dtype, batch * m.stride_b + token * m.stride_n + col);
}

// A tile of a group's tokens.
__device__ inline Tokens group_tile(const Joint& a, int64_t batch, int64_t group, int tile) {
  const int64_t first = group * a.group, left = a.n - first;
  const int count = static_cast<int>(left < a.group ? left : a.group);
  return {batch, first + int64_t{tile} * kSide, int64_t{tile} * kSide, smaller(kSide, count - tile * kSide)};
}

template <class T>
cudaError_t launch_joint_scores(const JointScores& p, cudaStream_t stream);
template <class T>
cudaError_t launch_joint_rows(const JointRows& p, cudaStream_t stream);
cudaError_t launch_joint_state(const JointState& p, cudaStream_t stream);
cudaError_t launch_joint_gate(const JointGate& p, cudaStream_t stream);
cudaError_t launch_joint_bias(const JointBias& p, cudaStream_t stream);

}  // namespace vicinal::cuda
