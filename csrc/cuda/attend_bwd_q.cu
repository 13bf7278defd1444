// attend, backward, the pass that owns queries: dq, and partial sums of the bias gradient.
//
// A block takes one tile of queries of one head through the windows of a chunk. Scores are computed again
// from lse. Where a bias gradient is wanted, the gradients of the scores are added, window after window, to
// the chunk's partial sum in memory, each element always by the same thread: no atomics, and one order
// whatever runs when.
#include "attend_bwd.cuh"

namespace vicinal::cuda {

namespace {

// partial[i, j] (+)= ds for the scores of one tile; pad queries and slots beyond the keys count as 0 or not
// at all.
template <int N>
__device__ __forceinline__ void add_bias_gradient(float* partial, const float (&ds)[N][4], int q_first,
                                                  int q_slots, int k_first, int k_total, bool first) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = q_first + e / 2 * 8, j = k_first + 8 * n + 2 * lane_pair() + e % 2;
      if (i >= q_slots || j >= k_total) continue;
      float* sum = partial + static_cast<int64_t>(i) * k_total + j;
      *sum = first ? ds[n][e] : *sum + ds[n][e];
    }
  }
}

template <class T, int kCols>
__global__ void __launch_bounds__(kMaxThreads)
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

  uint32_t block = blockIdx.x;
  const int part = take_index(block, t.parts), head = take_index(block, a.heads);
  const int q_first = take_index(block, t.q_tiles) * rows, chunk = static_cast<int>(block);
  const int first_col = part * kCols, cols = smaller(kCols, t.d_pad - first_col);
  const int64_t windows = a.batch * a.plan.n_rows, per_chunk = (windows + chunks - 1) / chunks;
  const int64_t begin = chunk * per_chunk, end = begin + per_chunk < windows ? begin + per_chunk : windows;
  float* partial = nullptr;
  if (buffers.bias && part == 0) {
    partial = buffers.bias + (static_cast<int64_t>(chunk) * a.heads + head) * a.plan.q_slots * t.k_total;
  }

  for (int64_t window = begin; window < end; ++window) {
    const Window w{window / a.plan.n_rows, head, static_cast<int32_t>(window % a.plan.n_rows)};
    const Logits logit(a, w);
    const Dropout dropout(a, w);
    for (int i = threadIdx.x; i < rows; i += blockDim.x)
      queries[i] = query_slot_bwd(p, buffers.delta, w, q_first + i);
    simt::sync_threads();
    load_rows(q_tile, t.d_stride, queries, rows, a.q, a.q, w, a.head_dim, t.d_pad, t.q_align);
    load_rows(dout_tile, t.dv_stride, queries, rows, p.dout, p.dout, w, a.head_dim_v, t.dv_pad, t.out_align);
    const QuerySlot q[2] = {queries[up], queries[up + 8]};
    float dq[M][4] = {};

    auto load_slots = [&](int tile, int stage) {
      for (int j = threadIdx.x; j < kInner; j += blockDim.x)
        keys[stage * kInner + j] = key_slot(a, w, tile * kInner + j);
    };
    auto load_tiles = [&](int tile, int stage) {
      const int count = smaller(kInner, t.k_total - tile * kInner);
      load_rows(k_tile + stage * kInner * t.d_stride, t.d_stride, keys + stage * kInner, count, a.k,
                a.extra_k, w, a.head_dim, t.d_pad, t.k_align);
      load_rows(v_tile + stage * kInner * t.dv_stride, t.dv_stride, keys + stage * kInner, count, a.v,
                a.extra_v, w, a.head_dim_v, t.dv_pad, t.v_align);
    };
    for_each_tile(t.k_tiles, t.stages, load_slots, load_tiles, [&](int tile, int stage) {
      const int count = smaller(kInner, t.k_total - tile * kInner);
      const T* k_rows = k_tile + stage * kInner * t.d_stride;
      float s[N][4] = {}, dp[N][4] = {};
      product_nt(s, q_tile + warp_row() * t.d_stride, t.d_stride, k_rows, t.d_stride, t.d_pad, count);
      product_nt(dp, dout_tile + warp_row() * t.dv_stride, t.dv_stride, v_tile + stage * kInner * t.dv_stride,
                 t.dv_stride, t.dv_pad, count);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int j = 8 * n + 2 * lane_pair();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float2 z{1.0f, 1.0f};
          if (dropout.on()) z = dropout.pair(q[r].token, tile * kInner + j);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const KeySlot key = keys[stage * kInner + j + e];
            const float logits =
                logit(s[n][2 * r + e], q[r], key, q_first + up + 8 * r, tile * kInner + j + e);
            dp[n][2 * r + e] = pair_grad(a.activation, logits, dp[n][2 * r + e], e ? z.y : z.x, q[r]).ds;
            s[n][2 * r + e] = dp[n][2 * r + e] * key.scale;
          }
        }
      }
      if (partial)
        add_bias_gradient(partial, dp, q_first + up, a.plan.q_slots, tile * kInner, t.k_total,
                          window == begin);
      product_pn<T>(dq, s, k_rows + first_col, t.d_stride, count, cols);
    });

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (q[r].token == kNone) continue;
      store_row<T>(row_of<T>(p.dq, w.batch, q[r].token, w.head), dq, r == 1,
                   static_cast<float>(a.scale) * q[r].scale, first_col, a.head_dim, t.store_pairs);
    }
  }
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
