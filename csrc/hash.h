// hash attention: every token has a code of signs, the weight of a pair is the scalar product of two codes
// plus a constant. One projection makes queries and keys.
//
//   x = qk / |qk| (0 for a zero vector)     d(i, j) = 1 - 2 x_i . anchor_j + |anchor_j|^2
//   sigma = mean of d over tokens and anchors, per sample and head
//   y = (exp(-d / (2 sigma)) - mean) weight^T      code = +1 where y >= 0, else -1
//   S = sum_j code_j v_j^T    z = sum_j code_j     X = sum_j v_j, or v_i if `self`
//   out_i = (code_i . S + offset X) / (code_i . z + n offset)
//
// Backward: straight through, dy = dcode where |y| < 1 and 0 elsewhere; sigma is differentiated; anchors,
// weight and mean get no gradient.
//
// Plain data only, as attend.h. "acc" is float, or double when dtype is F64.
#pragma once
#include "attend.h"

namespace vicinal {

constexpr int kHashBits = 16;  // at most

struct Hash {
  DType dtype;
  int64_t batch, n;
  int32_t heads, dim, dim_v, anchors, bits, self;
  double offset;
  Rows qk, v;                          // [B, n, heads, dim], [B, n, heads, dim_v]
  const void *anchor, *weight, *mean;  // acc [heads, anchors, dim], [heads, bits, anchors], [heads, anchors]

  // Of `state`, per sample and head: S [bits][dim_v], sum of v [dim_v], z [bits], sigma.
  int64_t state_size() const { return int64_t(bits + 1) * dim_v + bits + 1; }
};

// A word per token: bit i is set where y_i >= 0, bit kHashBits + i where |y_i| < 1.
struct HashFwd {
  Hash a;
  Rows out;
  int32_t* codes;  // [B, heads, n]
  void* state;     // acc [B, heads, state_size]
};

struct HashBwd {
  Hash a;
  Rows dout, dqk, dv;
  const int32_t* codes;
  const void* state;
};

namespace cpu {
void hash_fwd(const HashFwd& p, int threads);
void hash_bwd(const HashBwd& p, int threads);
}  // namespace cpu
// A cudaError_t; workspace: as many bytes as asked for.
namespace cuda {
int64_t hash_fwd_workspace(const HashFwd& p);
int64_t hash_bwd_workspace(const HashBwd& p);
int hash_fwd(const HashFwd& p, void* workspace, void* stream);
int hash_bwd(const HashBwd& p, void* workspace, void* stream);
}  // namespace cuda

}  // namespace vicinal
