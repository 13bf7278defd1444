// attend, forward: out = dropout(softmax(s)) v and lse for every window of a plan (csrc/attend.h has the
// formula).
//
// A block owns up to 64 queries of one window and head, a warp 16 of them; keys come in tiles of 32 or 64
// through one or two buffers of shared memory. Scores stay in registers between the two products, running
// maximum and sum as usual. Values wider than 128 columns are split over blocks, each of which repeats the
// scores: no wider accumulator exists.
#include "launch.cuh"

namespace vicinal::cuda {

namespace {

// One step of the running softmax for the two rows of a thread: s becomes the weights of the tile, m and l
// follow, and the accumulator is rescaled. For other activations the weights need no m, which then serves lse
// alone.
template <int N, int M>
__device__ __forceinline__ void softmax_step(float (&s)[N][4], float (&o)[M][4], float (&m)[2], float (&l)[2],
                                             Activation activation) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = m[r];
#pragma unroll
    for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    top = row_max(top);
    const float base = top == minus_infinity() ? 0.0f : top;  // -inf: a row without a key so far
    const float shrink = simt::ex2((m[r] - base) * kLog2E);
    m[r] = top;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        const float p = simt::ex2((s[n][i] - base) * kLog2E);
        sum += p;
        s[n][i] = activation == kSoftmax ? p : activated(activation, s[n][i]);
      }
    }
    l[r] = l[r] * shrink + sum;
    if (activation != kSoftmax) continue;
#pragma unroll
    for (int c = 0; c < M; ++c) {
      o[c][2 * r] *= shrink;
      o[c][2 * r + 1] *= shrink;
    }
  }
}

template <class T, int kCols, int kKeys>
__global__ void __launch_bounds__(kMaxThreads, kCols <= 64 ? 4 : 1) attend_fwd_kernel(AttendFwd p, Tiling t) {
  constexpr int N = kKeys / 8, M = kCols / 8;
  const Attend& a = p.a;
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  const int rows = block_rows(), up = warp_row() + lane_group();
  auto* queries = carver.take<QuerySlot>(rows);
  auto* keys = carver.take<KeySlot>(t.stages * kKeys);
  T* q_tile = carver.take<T>(rows * t.d_stride);
  T* k_tile = carver.take<T>(t.stages * kKeys * t.d_stride);
  T* v_tile = carver.take<T>(t.stages * kKeys * t.dv_stride);

  uint32_t block = blockIdx.x;
  const int part = take_index(block, t.parts), head = take_index(block, a.heads);
  const int q_first = take_index(block, t.q_tiles) * rows;
  const int row = take_index(block, static_cast<int>(a.plan.n_rows));
  const Window w{block, head, row};
  const int first_col = part * kCols, cols = smaller(kCols, t.dv_pad - first_col);
  if (q_first >= box_slots(a.plan.rows[row].q_extent)) return;
  const int kv_head = head / head_group(a), k_total = key_count(a, a.plan.rows[row]);
  const Logits logit(a, w);
  const Dropout dropout(a, w.batch, head);

  for (int i = threadIdx.x; i < rows; i += blockDim.x) queries[i] = query_slot(a, w, q_first + i);
  simt::sync_threads();
  load_rows(q_tile, t.d_stride, queries, rows, a.q, a.q, w.batch, head, a.head_dim, t.d_pad, t.q_align);
  const QuerySlot q[2] = {queries[up], queries[up + 8]};
  const WarpBox of_warp(queries + warp_row(), logit.guard);
  float o[M][4] = {}, m[2] = {minus_infinity(), minus_infinity()}, l[2] = {};

  auto load_slots = [&](int tile, int stage) {
    for (int j = threadIdx.x; j < kKeys; j += blockDim.x)
      keys[stage * kKeys + j] = key_slot(a, w, tile * kKeys + j);
  };
  auto load_tiles = [&](int tile, int stage) {
    const int count = smaller(kKeys, k_total - tile * kKeys);
    load_rows(k_tile + stage * kKeys * t.d_stride, t.d_stride, keys + stage * kKeys, count, a.k, a.extra_k,
              w.batch, kv_head, a.head_dim, t.d_pad, t.k_align);
    load_rows(v_tile + stage * kKeys * t.dv_stride, t.dv_stride, keys + stage * kKeys, count, a.v, a.extra_v,
              w.batch, kv_head, a.head_dim_v, t.dv_pad, t.v_align);
  };
  for_each_tile(tiles_of(k_total, kKeys), t.stages, load_slots, load_tiles, [&](int tile, int stage) {
    const int count = smaller(kKeys, k_total - tile * kKeys);
    if (of_warp.skips(keys + stage * kKeys, count)) return;
    float s[N][4] = {};
    product_nt(s, q_tile + warp_row() * t.d_stride, t.d_stride, k_tile + stage * kKeys * t.d_stride,
               t.d_stride, t.d_pad, count);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 8 * n + 2 * lane_pair() + i % 2;
        const KeySlot key = keys[stage * kKeys + j];
        s[n][i] = logit(s[n][i], q[i / 2], key, q_first + up + i / 2 * 8, tile * kKeys + j);
      }
    }
    softmax_step(s, o, m, l, a.activation);
    if (dropout.on()) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int j = 8 * n + 2 * lane_pair();
          const KeySlot* key = keys + stage * kKeys + j;
          const float2 z = dropout.pair(q[r].token, tile * kKeys + j, key[0], key[1]);
          s[n][2 * r] *= z.x;
          s[n][2 * r + 1] *= z.y;
        }
      }
    }
    product_pn<T>(o, s, v_tile + stage * kKeys * t.dv_stride + first_col, t.dv_stride, count, cols);
  });

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = row_sum(l[r]);
    if (q[r].token == kNone) continue;
    const float factor = a.activation != kSoftmax ? 1.0f : sum > 0.0f ? 1.0f / sum : 0.0f;
    store_row<T>(row_of<T>(p.out, w.batch, q[r].token, w.head), o, r == 1, factor, first_col, a.head_dim_v,
                 t.store_pairs);
    if (part == 0 && lane_pair() == 0) {
      float* lse = static_cast<float*>(p.lse) + (w.batch * a.n_q + q[r].token) * p.lse_stride_n + w.head;
      *lse = sum > 0.0f ? fmaf(kLn2, log2f(sum), m[r]) : minus_infinity();
    }
  }
}

template <class T, int kCols>
cudaError_t forward(const AttendFwd& p, cudaStream_t stream) {
  constexpr int kKeys = kCols <= 64 ? 64 : 32;
  const Attend& a = p.a;
  Tiling t = tiling_of<T>(a, kCols);
  t.store_pairs = alignment(p.out, sizeof(T)) >= 4;
  const Cut cut = cut_for(a.plan.q_slots, t.k_total, kKeys, [&](int rows, int stages) {
    return smem_of<QuerySlot>(rows) + smem_of<KeySlot>(stages * kKeys) + smem_of<T>(rows * t.d_stride) +
           smem_of<T>(stages * kKeys * t.d_stride) + smem_of<T>(stages * kKeys * t.dv_stride);
  });
  if (!cut.rows) return cudaErrorInvalidConfiguration;
  t.q_tiles = cut.own_tiles;
  t.k_tiles = cut.inner_tiles;
  t.stages = cut.stages;
  const int64_t blocks = a.batch * a.plan.n_rows * t.q_tiles * a.heads * t.parts;
  return launch_blocks(attend_fwd_kernel<T, kCols, kKeys>, blocks, 2 * cut.rows, cut.smem, stream, p, t);
}

}  // namespace

int attend_fwd(const AttendFwd& p, void* stream) {
  if (!p.a.batch || !p.a.heads || !p.a.plan.n_rows || !p.a.n_q) return cudaSuccess;
  const cudaError_t refused = refuse(p.a);
  if (refused != cudaSuccess) return refused;
  return dispatch(p.a, [&](auto type, auto cols) {
    return forward<decltype(type), decltype(cols)::value>(p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace vicinal::cuda
