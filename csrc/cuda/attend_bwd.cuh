// What the passes of the backward share: how it is cut, its workspace, slots with the results of the forward.
#pragma once

#include "launch.cuh"

namespace vicinal::cuda {

// The two passes and the float32 workspace between them and the reductions.
struct BwdPlan {
  Tiling q, kv;  // of the pass that owns queries and of the one that owns keys
  Cut q_cut, kv_cut;
  int32_t chunks;  // groups of windows that add up their bias gradients in one partial sum
  int32_t edge_slots,
      extra_slots;  // partial sums per window for the edge row (one a tile of keys), and for other extra rows
  int64_t delta, bias, codes, extra, total;  // offsets in floats, and the size of the workspace
};

struct BwdBuffers {
  float* delta;    // [B, n_q, heads]: rowsum(dout * out) - dlse
  float* bias;     // [chunks, heads, q_slots, k_total], or null
  int32_t* codes;  // [q_slots + k_slots] of plan row 0
  float* extra;    // [B, heads, n_rows, edge_slots + extra_slots, head_dim + head_dim_v], or null
};

__device__ inline QuerySlot query_slot_bwd(const AttendBwd& p, const float* delta, const Window& w,
                                           int slot) {
  QuerySlot q = query_slot(p.a, w, slot);
  if (q.token == kNone) return q;
  const int64_t token = w.batch * p.a.n_q + q.token;
  q.lse = static_cast<const float*>(p.lse)[token * p.lse_stride_n + w.head];
  q.delta = delta[token * p.a.heads + w.head];
  return q;
}

template <class T, int kCols>
cudaError_t backward_q(const AttendBwd& p, const BwdPlan& plan, const BwdBuffers& buffers,
                       cudaStream_t stream);
template <class T, int kCols>
cudaError_t backward_kv(const AttendBwd& p, const BwdPlan& plan, const BwdBuffers& buffers,
                        cudaStream_t stream);

// Instances live in attend_bwd_q.cu and attend_bwd_kv.cu.
#define FOR_EACH_BWD_INSTANCE(X) \
  X(bf16, 32)                    \
  X(bf16, 64) X(bf16, 128) X(half, 32) X(half, 64) X(half, 128) X(float, 32) X(float, 64) X(float, 128)

// Slots of the inner tiles. 64 would halve the number of tiles, but the two accumulators of scores would then
// cost 32 more registers and a block of four a multiprocessor: D = 32 compiles to 126 and 148 registers so,
// to 167 and 168 with 64.
constexpr int kInner = 32;

}  // namespace vicinal::cuda
