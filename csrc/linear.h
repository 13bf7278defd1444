// linear: attention whose weight is a product of features, so that its cost is linear in the tokens.
//
// Plain data only, shared by the launchers of every backend; no torch header. Strides count elements and may
// be anything: [B, N, H, D] in memory order, head-first, or NCHW, whose token stride is 1. "acc" is float, or
// double when dtype is F64; acc arrays are contiguous but for the decay.
//
// Heads: v, out, decay, den and the states have `heads` heads; q, k, q_den and k_den have `heads_qk`, and
// head h reads head h / (heads / heads_qk) of them. Gradients of shared heads are sums over the heads that
// share.
//
// Sequences: without cu_seqlens sample b is sequence b. With it batch is 1, n_q = n_k and sequence r is the
// tokens cu_seqlens[r] .. cu_seqlens[r + 1] - 1, perhaps none; tokens from cu_seqlens[sequences] on belong to
// no sequence: their out and gradients are 0, their den is 1. Sums, states, decay and blocks start anew in
// every sequence. i and j count tokens of one sequence below.
//
// Features, K = dim (+ 1 with a constant), Kd = dim_den or dim (+ 1 with a constant):
//
//   f_i  = scale * phi_q(q_i)                     p_j  = m_j * phi_k(k_j)      m_j = 0 where key_mask is 1
//   fd_i = scale * q_den_i  (f_i without q_den)   pd_j = m_j * k_den_j         (p_j without k_den)
//   constant != 0: one more channel, f and fd: 1 (not times scale), p and pd: constant * m_j; no gradient
//
// What a masked key holds (k, v, k_den), NaN even, has no effect; its gradients are 0. Its decay counts.
//
//   D_ij = 1 (kMaskFull), [j <= i] exp(b_i - b_j) (kMaskCausal), [block j < block i] (kMaskBlocksBefore) or
//          [block j <= block i] (kMaskBlocksUpTo); b = inclusive cumsum of decay, block i = i / block_size
//   num_i = sum_j (f_i . p_j) D_ij v_j + e_i f_i S0      e_i = exp(b_i) with a decay, otherwise 1
//   den_i = sum_j (fd_i . pd_j) D_ij + e_i fd_i . z0 + eps
//   out_i = num_i / den_i, or num_i where not normalised; 0 where |den_i| < kSmallestDen
//
//   S0 = initial_s [sequences, heads, K, dim_v], z0 = initial_z [sequences, heads, Kd], 0 where null
//   final_s = e_N S0 + sum_j exp(b_N - b_j) p_j v_j^T      final_z = e_N z0 + sum_j exp(b_N - b_j) pd_j
//
// kMaskFull: n_q and n_k may differ; final_s and final_z are the sums that every query reads. Decays only
// with kMaskCausal.
//
// Gradients. r_i = dout_i / den_i and d_i = -(out_i . dout_i) / den_i; both 0 where |den_i| < kSmallestDen;
// r_i = dout_i, d_i = 0 where not normalised. (out_i . dout_i is also f_i . u_i, with u_i the gradient of f_i
// through num_i alone: kernels take that, since out is rounded and dq may be a small difference.) With dS, dz
// the gradients of the sums that a token adds to (or reads), which start from dfinal_s, dfinal_z (null: 0)
// and gather f_i r_i^T and d_i fd_i:
//
//   df_i = sum_j D_ij (r_i . v_j) p_j + e_i S0 r_i           dfd_i = sum_j D_ij d_i pd_j + e_i d_i z0
//   dp_j = sum_i D_ij (r_i . v_j) f_i + exp(b_N - b_j) dfinal_s v_j
//   dpd_j = sum_i D_ij d_i fd_i + exp(b_N - b_j) dfinal_z
//   dv_j = sum_i D_ij (f_i . p_j) r_i + exp(b_N - b_j) dfinal_s^T p_j
//   dq = scale * phi_q'(q) * df,  dk = m * phi_k'(k) * dp;  without q_den: df + dfd and dp + dpd
//   db_i = f_i . df_i + fd_i . dfd_i - p_i . dp_i - pd_i . dpd_i, and for the last token of the sequence also
//          + <final_s, dfinal_s> + <final_z, dfinal_z>
//   ddecay_i = sum of db_j over j >= i
//   dinitial_s = e_N dfinal_s + sum_i e_i f_i r_i^T          dinitial_z = e_N dfinal_z + sum_i e_i d_i fd_i
//
// In chunks of the causal loop, with h the state entering and dh the gradient of the state leaving a chunk,
// take b from the start of the chunk and h, dh, h' in place of S0, dfinal_s, final_s: sum db inside a chunk
// and add <h', dh> at its last token. (Over a whole sequence the same sum subtracts large numbers.)
//
// Numbers: features, sums, states, decay and divisions in acc. Only differences b_i - b_j <= 0 are exponents.
// Sums over tokens are made of parts in an order that depends on the problem alone; no atomics.
#pragma once
#include "attend.h"

namespace vicinal {

// A tensor [B, N, H, D].
struct Strided {
  void* data;
  int64_t stride_b, stride_n, stride_h, stride_d;
};

// phi(x) and phi'(x); `param` is one number per map.
//   identity  x                                        1
//   elu1      x >= 0 ? x + 1 : exp(x)                  x >= 0 ? 1 : phi
//   relu      max(x, 0) + param                        x > 0
//   relu2     max(x, 0)^2                              2 max(x, 0)
//   exp       exp(min(x - param, kMostExponent))       x - param <= kMostExponent ? phi : 0
enum FeatureMap : int32_t { kMapIdentity = 0, kMapElu1 = 1, kMapRelu = 2, kMapRelu2 = 3, kMapExp = 4 };
constexpr double kMostExponent = 32.0;

enum LinearMask : int32_t { kMaskFull = 0, kMaskCausal = 1, kMaskBlocksBefore = 2, kMaskBlocksUpTo = 3 };

constexpr double kSmallestDen = 1e-30;

// Everything but the tensors that are written. Null pointers switch an option off.
struct Linear {
  DType dtype;
  LinearMask mask;
  FeatureMap map_q, map_k;
  double param_q, param_k;
  int64_t batch, sequences, n_q, n_k;            // tokens per sample; sequences = batch without cu_seqlens
  int32_t heads, heads_qk, dim, dim_v, dim_den;  // dim_den: of q_den and k_den, 0 without
  int32_t normalize;
  double scale, eps, constant;
  int64_t block_size;  // of the block masks
  int64_t chunk_size;  // a wish for the tokens per chunk of the causal loop; 0: the kernel's choice
  Strided q, k, v, q_den, k_den;  // dtype
  const void* decay;              // acc: log-decay <= 0, element (b, n, h); a constant per head has strides 0
  int64_t decay_stride_b, decay_stride_n, decay_stride_h;
  const uint8_t* key_mask;    // [B, n_k], 1 = ignored
  const int32_t* cu_seqlens;  // [sequences + 1], in the memory of the device
  const void* initial_s;      // acc [sequences, heads, K, dim_v]
  const void* initial_z;      // acc [sequences, heads, Kd], with initial_s where normalised
};

struct LinearFwd {
  Linear a;
  Strided out;    // dtype [B, n_q, heads, dim_v]
  void* den;      // acc [B, heads, n_q], eps included; null where not normalised
  void* final_s;  // acc, as initial_s; always written
  void* final_z;  // acc, as initial_z; null where not normalised
};

// All gradients are overwritten. Null data or pointer: not wanted.
struct LinearBwd {
  Linear a;
  Strided out, dout;
  const void* den;  // as the forward wrote them
  const void *final_s, *final_z;
  const void *dfinal_s, *dfinal_z;     // acc; null: 0
  Strided dq, dk, dv, dq_den, dk_den;  // dtype; dq and dk of heads_qk heads
  void* ddecay;                        // acc [B, n_k, heads] whatever the strides of decay are
  void *dinitial_s, *dinitial_z;       // acc
};

// One token per sample, n_q = n_k = 1, kMaskCausal: out from the states after the update
//   S = exp(decay) S + p v^T    z = exp(decay) z + p    out = f S / (f . z + eps)
// in place. initial_s and initial_z of `a` are not read; no key_mask, cu_seqlens, q_den.
struct LinearStep {
  Linear a;
  Strided out;
  void *s, *z;  // acc, read and overwritten
};

namespace cpu {
void linear_fwd(const LinearFwd& p, int threads);
void linear_bwd(const LinearBwd& p, int threads);
void linear_step(const LinearStep& p, int threads);
}  // namespace cpu
// A cudaError_t; workspace: as many bytes as asked for.
namespace cuda {
int64_t linear_fwd_workspace(const LinearFwd& p);
int64_t linear_bwd_workspace(const LinearBwd& p);
int linear_fwd(const LinearFwd& p, void* workspace, void* stream);
int linear_bwd(const LinearBwd& p, void* workspace, void* stream);
int linear_step(const LinearStep& p, void* stream);
}  // namespace cuda

}  // namespace vicinal
