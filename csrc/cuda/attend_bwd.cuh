// What the passes of the backward share: how it is cut, its workspace, slots with the results of the forward.
#pragma once

#include "launch.cuh"

namespace vicinal::cuda {

// What a launch of the pass that owns keys takes: all key slots of a row (and extra rows), or extra rows
// alone, over several rows.
struct KeyPass {
  Tiling t;
  Cut cut;
  int32_t edge_slots,
      extra_slots;            // partial sums for the edge row (one a tile of keys), for other extra rows
  int32_t chunks, rows_each;  // rows are taken in so many chunks of so many
  bool extra_only;
};

// The passes and the float32 workspace between them and the reductions.
struct BwdPlan {
  Tiling q;  // of the pass that owns queries
  Cut q_cut;
  int32_t chunks;  // groups of windows that add up their bias gradients in one partial sum
  bool own_keys;   // a.plan owns the keys too
  KeyPass keys, extra;
  int64_t delta, bias, tables, partial, total;  // offsets in floats, and the size of the workspace
};

struct BwdBuffers {
  float* delta;   // [B, n_q, heads]: rowsum(dout out) - dlse
  float* bias;    // [chunks, q_tiles, heads, bias_size], or null
  float* tables;  // the warps' tables of each of these blocks where shared memory does not hold them, or null
  float* extra;   // [B, kv_heads, chunks, edge_slots + extra_slots, head_dim + head_dim_v], or null
};

// A warp's table of the bias gradient: 16 rows of 32 gradients on their way there, and the entries. The
// stride of the rows spreads float2 stores over the banks.
constexpr int kStageStride = 40;
__host__ __device__ inline int table_floats(int entries) { return 16 * kStageStride + (entries + 3) / 4 * 4; }

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
cudaError_t backward_kv(const AttendBwd& p, const KeyPass& pass, const BwdBuffers& buffers,
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
