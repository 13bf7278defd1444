// edge attention: every destination attends to the sources of its in-edges. A graph is a CSR by destination
// and one by source; a "slot" is a place in the list of edges sorted by destination.
//
// For a slot e of destination i with source j, per head and channel c:
//
//   key = k_j + edge_k_e     t = scale q_i * key * edge_mul_e     value = (v_j + edge_v_e) * edge_gate_e
//
//   softmax  x = clip(sum_c t + edge_bias_e)   p = exp(x) / sum exp(x)            out_i = sum_e p value
//   exp      x likewise                        p = exp(x) / (sum exp(x) + eps)    out_i = sum_e p value
//   gate     w_c = exp(clip(t_c + edge_bias_e))                                   out_i = sum_e w * value
//
// Terms that are not there are 0 (k, v, bias) or 1 (mul, gate); clip is to [-clamp, clamp], or nothing.
// lse is the logarithm of the divisor (softmax, exp). `edge` is t, for models that go on with it.
//
// Backward, with P and delta of the recomputed p:  dP = dout_i . value   delta_i = sum_e p dP - dlse_i
//   dx = p (dP - delta_i) inside the clip, else 0     dt = dx + dedge       dvalue = p dout_i
//   gate: dt = dout_i * value * w + dedge             dvalue = w * dout_i   dbias = sum_c dt without dedge
//   dq_i = sum_e scale dt key mul      dedge_k = scale dt q mul      dmul = scale dt q key
//   dedge_v = dvalue gate              dgate = dvalue (v + edge_v)
//   dk_j, dv_j: sums of dedge_k, dedge_v over the out-edges of j
//
// Plain data only, as attend.h. "acc" is float, or double when dtype is F64.
#pragma once
#include "attend.h"

namespace vicinal {

enum EdgeMode : int32_t { kEdgeSoftmax = 0, kEdgeExp = 1, kEdgeGate = 2 };

// Numbers of slots are int32, or int64 where `wide`.
struct Graph {
  int64_t n_dst, n_src;
  int32_t wide;
  const void* rowptr;      // [n_dst + 1]: slots rowptr[i] .. rowptr[i + 1] - 1 are those of destination i
  const int32_t* col;      // [slots]: source
  const void* edge_id;     // [slots]: row of the edge tensors
  const void* colptr;      // [n_src + 1]: the same by source, for the backward
  const void* rev;         // [slots]: slots in the order of their sources
  const int32_t* rev_dst;  // [slots]: destinations of rev
};

struct Edge {
  DType dtype;
  EdgeMode mode;
  int32_t heads, dim, dim_v;
  int64_t edges;  // rows of the edge tensors
  int32_t tied;   // edge_v is edge_k: one tensor, and its gradient, the sum of both, in dedge_k
  double scale, eps;
  double clamp;  // negative: none
  Graph graph;
  Rows q, k, v;                              // [n_dst, ..], [n_src, ..], [n_src, ..]; stride_b is 0
  Rows edge_k, edge_v, edge_mul, edge_gate;  // dtype [edges, ..]; null data: not there
  const void* bias;                          // acc [edges, heads], or null
};

struct EdgeFwd {
  Edge a;
  Rows out;
  void* lse;  // acc [n_dst, heads]; null with kEdgeGate
  Rows edge;  // dtype; rows of the edge tensors that have no slot are not written
};

// Null data: not wanted. Rows of edge gradients that have no slot are not written.
struct EdgeBwd {
  Edge a;
  Rows dout;
  const void* dlse;  // acc [n_dst, heads], or null
  Rows dedge;        // or null
  Rows dq, dk, dv;
  Rows dedge_k, dedge_v, dedge_mul, dedge_gate;
  void* dbias;    // acc [edges, heads]
  void* weights;  // acc [slots][2][heads]: p and dx, from the pass by destination to that by source; not gate
};

namespace cpu {
void edge_fwd(const EdgeFwd& p, int threads);
void edge_bwd(const EdgeBwd& p, int threads);
}  // namespace cpu

}  // namespace vicinal
