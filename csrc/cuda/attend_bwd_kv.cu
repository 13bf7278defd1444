// attend, backward, the pass that owns keys: dk, dv, and partial sums for the extra rows.
//
// A block owns up to 64 key slots of one window and key head, a warp 16 of them, and sweeps the queries of
// the window and of all heads that read it; where keys have a plan of their own, another launch takes the
// extra rows alone through chunks of windows. Scores are computed transposed, keys by queries, so that
// weights and their gradients are left operands of the products with dout and q.
#include "attend_bwd.cuh"

namespace vicinal::cuda {

namespace {

// Columns [first_col, first_col + cols) of one tile's gradient of extra rows: the sum over its pads for the
// edge row, one row for each other extra row that the tile holds. `partial`: of the window, `stride` floats a
// slot.
template <int M>
__device__ __forceinline__ void store_extra(float* partial, int64_t stride, float* stage,
                                            const float (&c)[M][4], const KeySlot* keys, float scale,
                                            int tile, int edge_slots, int edge_row, int first_col, int dim) {
  const int rows = block_rows();
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = warp_row() + lane_group() + e / 2 * 8;
      stage[row * 8 * M + 8 * m + 2 * lane_pair() + e % 2] = c[m][e];
    }
  }
  simt::sync_threads();
  for (int col = threadIdx.x; col < 8 * M && first_col + col < dim; col += blockDim.x) {
    float edge = 0.0f;
    for (int row = 0; row < rows; ++row) {
      const int32_t token = keys[row].token;
      if (token > kExtra || token == kNone) continue;
      const float value = stage[row * 8 * M + col];
      if (keys[row].region >= 0) {
        edge += value;
      } else {
        const int slot = edge_slots + kExtra - token - edge_row;
        partial[slot * stride + first_col + col] = scale * value;
      }
    }
    if (edge_slots) partial[tile * stride + first_col + col] = scale * edge;
  }
  simt::sync_threads();
}

template <class T, int kCols>
__global__ void __launch_bounds__(kMaxThreads)
    attend_bwd_kv_kernel(AttendBwd p, KeyPass pass, BwdBuffers buffers) {
  constexpr int N = kInner / 8, M = kCols / 8;
  const Attend& a = p.a;
  const Tiling& t = pass.t;
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  const int rows = block_rows(), up = warp_row() + lane_group();
  auto* keys = carver.take<KeySlot>(rows);
  auto* queries = carver.take<QuerySlot>(t.stages * kInner);
  T* k_tile = carver.take<T>(rows * t.d_stride);
  T* v_tile = carver.take<T>(rows * t.dv_stride);
  T* q_tile = carver.take<T>(t.stages * kInner * t.d_stride);
  T* dout_tile = carver.take<T>(t.stages * kInner * t.dv_stride);
  float* stage_rows = carver.take<float>(buffers.extra ? rows * kCols : 0);

  uint32_t block = blockIdx.x;
  const int part = take_index(block, t.parts), kv_head = take_index(block, a.kv_heads),
            tile = take_index(block, t.k_tiles), chunk = take_index(block, pass.chunks);
  const int64_t batch = block;
  const int first_row = chunk * pass.rows_each, group = head_group(a), first_col = part * kCols;
  const int row_count = smaller(pass.rows_each, static_cast<int>(a.plan.n_rows) - first_row);
  const PlanRow& own = a.plan.rows[first_row];
  const int k_first = tile * rows + (pass.extra_only ? box_slots(own.k_extent) : 0);
  const int q_tiles = pass.rows_each == 1 ? tiles_of(box_slots(own.q_extent), kInner) : t.q_tiles;
  if (k_first >= key_count(a, own) && !buffers.extra) return;
  const Window first_window{batch, kv_head * group, first_row};
  Dropout dropout(a, batch, 0);
  // The window and query head of an inner tile, which loses them.
  auto take_window = [&](int& inner) {
    const int rest = inner / q_tiles;
    inner %= q_tiles;
    return Window{batch, kv_head * group + rest % group, first_row + rest / group};
  };

  for (int j = threadIdx.x; j < rows; j += blockDim.x) keys[j] = key_slot(a, first_window, k_first + j);
  simt::sync_threads();
  load_rows(k_tile, t.d_stride, keys, rows, a.k, a.extra_k, batch, kv_head, a.head_dim, t.d_pad, t.k_align);
  load_rows(v_tile, t.dv_stride, keys, rows, a.v, a.extra_v, batch, kv_head, a.head_dim_v, t.dv_pad,
            t.v_align);
  const KeySlot key[2] = {keys[up], keys[up + 8]};
  const bool one_row = pass.rows_each == 1;
  const WarpBox of_warp(keys + warp_row(), one_row && own.flags & kRowRanges ? a.plan.guard : 0);
  float dk[M][4] = {}, dv[M][4] = {};

  auto load_slots = [&](int inner, int stage) {
    const Window w = take_window(inner);
    for (int i = threadIdx.x; i < kInner; i += blockDim.x) {
      queries[stage * kInner + i] = query_slot_bwd(p, buffers.delta, w, inner * kInner + i);
    }
  };
  auto load_tiles = [&](int inner, int stage) {
    const Window w = take_window(inner);
    const int count = smaller(kInner, box_slots(a.plan.rows[w.row].q_extent) - inner * kInner);
    load_rows(q_tile + stage * kInner * t.d_stride, t.d_stride, queries + stage * kInner, count, a.q, a.q,
              batch, w.head, a.head_dim, t.d_pad, t.q_align);
    load_rows(dout_tile + stage * kInner * t.dv_stride, t.dv_stride, queries + stage * kInner, count, p.dout,
              p.dout, batch, w.head, a.head_dim_v, t.dv_pad, t.out_align);
  };
  for_each_tile(q_tiles * group * row_count, t.stages, load_slots, load_tiles, [&](int inner, int stage) {
    const Window w = take_window(inner);
    const int count = smaller(kInner, box_slots(a.plan.rows[w.row].q_extent) - inner * kInner);
    if (of_warp.skips(queries + stage * kInner, count)) return;
    const Logits logit(a, w);
    if (dropout.on()) dropout.set_head(a, batch, w.head);
    const T* q_rows = q_tile + stage * kInner * t.d_stride;
    const T* dout_rows = dout_tile + stage * kInner * t.dv_stride;
    float s[N][4] = {}, dp[N][4] = {};
    product_nt(s, k_tile + warp_row() * t.d_stride, t.d_stride, q_rows, t.d_stride, t.d_pad, count);
    product_nt(dp, v_tile + warp_row() * t.dv_stride, t.dv_stride, dout_rows, t.dv_stride, t.dv_pad, count);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = 8 * n + 2 * lane_pair() + e % 2, j = k_first + up + e / 2 * 8;
        const QuerySlot q = queries[stage * kInner + i];
        const float logits = logit(s[n][e], q, key[e / 2], inner * kInner + i, j);
        const float z = dropout.on() ? dropout.one(q.token, j, key[e / 2]) : 1.0f;
        const PairGrad grad = pair_grad(a.activation, logits, dp[n][e], z, q);
        s[n][e] = grad.p;
        dp[n][e] = grad.ds * q.scale;
      }
    }
    product_pn<T>(dv, s, dout_rows + first_col, t.dv_stride, count, t.dv_pad - first_col);
    product_pn<T>(dk, dp, q_rows + first_col, t.d_stride, count, t.d_pad - first_col);
  });

  const float scale = static_cast<float>(a.scale);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Of ignored keys too: their gradient is 0.
    const int32_t token = pass.extra_only ? kNone : key_token(a, first_window, k_first + up + 8 * r);
    if (token < 0) continue;
    store_row<T>(row_of<T>(p.dk, batch, token, kv_head), dk, r == 1, scale * key[r].scale, first_col,
                 a.head_dim, t.store_pairs);
    store_row<T>(row_of<T>(p.dv, batch, token, kv_head), dv, r == 1, 1.0f, first_col, a.head_dim_v,
                 t.store_pairs);
  }
  if (buffers.extra) {
    const int64_t stride = a.head_dim + a.head_dim_v;
    const int64_t at = (batch * a.kv_heads + kv_head) * pass.chunks + chunk;
    float* partial = buffers.extra + at * (pass.edge_slots + pass.extra_slots) * stride;
    store_extra(partial, stride, stage_rows, dk, keys, scale, tile, pass.edge_slots, a.edge_row, first_col,
                a.head_dim);
    store_extra(partial + a.head_dim, stride, stage_rows, dv, keys, 1.0f, tile, pass.edge_slots, a.edge_row,
                first_col, a.head_dim_v);
  }
}

}  // namespace

template <class T, int kCols>
cudaError_t backward_kv(const AttendBwd& p, const KeyPass& pass, const BwdBuffers& buffers,
                        cudaStream_t stream) {
  const int64_t blocks = p.a.batch * pass.chunks * pass.t.k_tiles * p.a.kv_heads * pass.t.parts;
  return launch_blocks(attend_bwd_kv_kernel<T, kCols>, blocks, 2 * pass.cut.rows, pass.cut.smem, stream, p,
                       pass, buffers);
}

#define INSTANCE(T, cols)                                                                        \
  template cudaError_t backward_kv<T, cols>(const AttendBwd&, const KeyPass&, const BwdBuffers&, \
                                            cudaStream_t);
FOR_EACH_BWD_INSTANCE(INSTANCE)
#undef INSTANCE

}  // namespace vicinal::cuda
