// attend, backward, the pass that owns queries: dq, and partial sums of the bias gradient.
//
// A block takes one tile of queries of one head through the windows of a chunk. Scores are computed again
// from lse. Where a bias gradient is wanted, each warp keeps a table of its own: of its 16 queries, one after
// another, the 32 keys of a tile have distinct entries, one a lane. No atomics, and one order whatever runs
// when; and no window has to look like another.
#include "attend_bwd.cuh"

namespace vicinal::cuda {

namespace {

// The table of a warp and the rows that it stages its gradients through.
struct WarpTable {
  float *sums, *stage;
};

__device__ inline WarpTable warp_table(float* tables, int entries) {
  float* mine = tables + threadIdx.x / 32 * table_floats(entries);
  return {mine + 16 * kStageStride, mine};
}

// Adds ds of the warp's 16 queries and a tile of keys. `queries`: the warp's; `single`: all keys of the box
// share entry 0.
template <int N>
__device__ __forceinline__ void add_bias_gradient(const WarpTable& to, const float (&ds)[N][4],
                                                  const QuerySlot* queries, const KeySlot* keys,
                                                  bool single) {
  static_assert(8 * N == 32, "a lane takes one key");
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float* at = to.stage + lane_group() * kStageStride + 8 * n + 2 * lane_pair();
    *reinterpret_cast<float2*>(at) = {ds[n][0], ds[n][1]};
    *reinterpret_cast<float2*>(at + 8 * kStageStride) = {ds[n][2], ds[n][3]};
  }
  simt::sync_warp();
  const int32_t code = keys[lane].code;
  const bool extra = keys[lane].region < 0;
#pragma unroll 1
  for (int i = 0; i < 16; ++i) {
    float value = to.stage[i * kStageStride + lane];
    if (single) {
      float sum = extra ? 0.0f : value;
      for (int lanes = 16; lanes; lanes /= 2) sum += simt::shfl_xor(sum, lanes);
      if (lane == 0) to.sums[0] += sum;
      if (!extra) value = 0.0f;
    }
    // Excluded pairs, whose entry may be no entry, have 0.
    if (value != 0.0f) to.sums[extra ? code : bias_index(queries[i].code, code)] += value;
    simt::sync_warp();
  }
}

// Adds the warps' tables into the block's.
__device__ inline void store_tables(float* partial, float* tables, int entries) {
  simt::sync_threads();
  const int warps = blockDim.x / 32;
  for (int i = threadIdx.x; i < entries; i += blockDim.x) {
    float sum = 0.0f;
    for (int warp = 0; warp < warps; ++warp)
      sum += tables[warp * table_floats(entries) + 16 * kStageStride + i];
    partial[i] = sum;
  }
}

template <class T, int kCols>
__global__ void __launch_bounds__(kMaxThreads, kCols <= 32 ? 4 : 1)
    attend_bwd_q_kernel(AttendBwd p, Tiling t, BwdBuffers buffers, int chunks) {
  constexpr int N = kInner / 8, M = kCols / 8;
  const Attend& a = p.a;
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  const int rows = block_rows(), up = warp_row() + lane_group();
  auto* queries = carver.take<QuerySlot>(rows);
  auto* keys = carver.take<KeySlot>(t.stages * kInner);
  T* q_tile = carver.take<T>(rows * t.d_stride);
  T* dout_tile = carver.take<T>(rows * t.dv_stride);
  T* k_tile = carver.take<T>(t.stages * kInner * t.d_stride);
  T* v_tile = carver.take<T>(t.stages * kInner * t.dv_stride);
  const int entries = buffers.bias ? static_cast<int>(a.bias_size) : 0;
  const int of_tables = entries ? rows / 16 * table_floats(entries) : 0;
  float* tables = carver.take<float>(buffers.tables ? 0 : of_tables);

  uint32_t block = blockIdx.x;
  const int part = take_index(block, t.parts);
  const int64_t bias_block = block;
  const int head = take_index(block, a.heads);
  const int q_first = take_index(block, t.q_tiles) * rows, chunk = static_cast<int>(block);
  const int first_col = part * kCols, cols = smaller(kCols, t.d_pad - first_col);
  const int kv_head = head / head_group(a);
  const int64_t windows = a.batch * a.plan.n_rows, per_chunk = (windows + chunks - 1) / chunks;
  const int64_t begin = chunk * per_chunk, end = begin + per_chunk < windows ? begin + per_chunk : windows;
  const bool biased = entries && part == 0;
  const bool single = a.bias_size - (a.n_extra - a.edge_row) <= 1;
  if (buffers.tables) tables = buffers.tables + bias_block * of_tables;
  if (biased) {
    for (int i = threadIdx.x; i < of_tables; i += blockDim.x) tables[i] = 0.0f;
    simt::sync_threads();
  }

  for (int64_t window = begin; window < end; ++window) {
    const Window w{window / a.plan.n_rows, head, static_cast<int32_t>(window % a.plan.n_rows)};
    if (q_first >= box_slots(a.plan.rows[w.row].q_extent)) continue;
    const int k_total = key_count(a, a.plan.rows[w.row]);
    const Logits logit(a, w);
    const Dropout dropout(a, w.batch, head);
    for (int i = threadIdx.x; i < rows; i += blockDim.x)
      queries[i] = query_slot_bwd(p, buffers.delta, w, q_first + i);
    simt::sync_threads();
    load_rows(q_tile, t.d_stride, queries, rows, a.q, a.q, w.batch, head, a.head_dim, t.d_pad, t.q_align);
    load_rows(dout_tile, t.dv_stride, queries, rows, p.dout, p.dout, w.batch, head, a.head_dim_v, t.dv_pad,
              t.out_align);
    const QuerySlot q[2] = {queries[up], queries[up + 8]};
    const WarpBox of_warp(queries + warp_row(), logit.guard);
    float dq[M][4] = {};

    auto load_slots = [&](int tile, int stage) {
      for (int j = threadIdx.x; j < kInner; j += blockDim.x)
        keys[stage * kInner + j] = key_slot(a, w, tile * kInner + j);
    };
    auto load_tiles = [&](int tile, int stage) {
      const int count = smaller(kInner, k_total - tile * kInner);
      load_rows(k_tile + stage * kInner * t.d_stride, t.d_stride, keys + stage * kInner, count, a.k,
                a.extra_k, w.batch, kv_head, a.head_dim, t.d_pad, t.k_align);
      load_rows(v_tile + stage * kInner * t.dv_stride, t.dv_stride, keys + stage * kInner, count, a.v,
                a.extra_v, w.batch, kv_head, a.head_dim_v, t.dv_pad, t.v_align);
    };
    for_each_tile(tiles_of(k_total, kInner), t.stages, load_slots, load_tiles, [&](int tile, int stage) {
      const int count = smaller(kInner, k_total - tile * kInner);
      if (of_warp.skips(keys + stage * kInner, count)) return;
      const T* k_rows = k_tile + stage * kInner * t.d_stride;
      float s[N][4] = {}, dp[N][4] = {};
      product_nt(s, q_tile + warp_row() * t.d_stride, t.d_stride, k_rows, t.d_stride, t.d_pad, count);
      product_nt(dp, dout_tile + warp_row() * t.dv_stride, t.dv_stride, v_tile + stage * kInner * t.dv_stride,
                 t.dv_stride, t.dv_pad, count);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int j = 8 * n + 2 * lane_pair();
        const KeySlot* key = keys + stage * kInner + j;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float2 z{1.0f, 1.0f};
          if (dropout.on()) z = dropout.pair(q[r].token, tile * kInner + j, key[0], key[1]);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float logits =
                logit(s[n][2 * r + e], q[r], key[e], q_first + up + 8 * r, tile * kInner + j + e);
            dp[n][2 * r + e] = pair_grad(a.activation, logits, dp[n][2 * r + e], e ? z.y : z.x, q[r]).ds;
            s[n][2 * r + e] = dp[n][2 * r + e] * key[e].scale;
          }
        }
      }
      if (biased) {
        add_bias_gradient(warp_table(tables, entries), dp, queries + warp_row(), keys + stage * kInner,
                          single);
      }
      product_pn<T>(dq, s, k_rows + first_col, t.d_stride, count, cols);
    });

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (q[r].token == kNone) continue;
      store_row<T>(row_of<T>(p.dq, w.batch, q[r].token, w.head), dq, r == 1,
                   static_cast<float>(a.scale) * q[r].scale, first_col, a.head_dim, t.store_pairs);
    }
  }
  if (biased) store_tables(buffers.bias + bias_block * entries, tables, entries);
}

}  // namespace

template <class T, int kCols>
cudaError_t backward_q(const AttendBwd& p, const BwdPlan& plan, const BwdBuffers& buffers,
                       cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(plan.chunks) * plan.q.q_tiles * p.a.heads * plan.q.parts;
  return launch_blocks(attend_bwd_q_kernel<T, kCols>, blocks, 2 * plan.q_cut.rows, plan.q_cut.smem, stream, p,
                       plan.q, buffers, plan.chunks);
}

#define INSTANCE(T, cols) \
  template cudaError_t backward_q<T, cols>(const AttendBwd&, const BwdPlan&, const BwdBuffers&, cudaStream_t);
FOR_EACH_BWD_INSTANCE(INSTANCE)
#undef INSTANCE

}  // namespace vicinal::cuda
