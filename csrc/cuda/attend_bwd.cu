// attend, backward: how it is cut and launched, and the small kernels around the two passes (attend_bwd_q.cu,
// attend_bwd_kv.cu): delta before them, sums of their partial results in a fixed order after them.
#include "attend_bwd.cuh"

namespace vicinal::cuda {

namespace {

constexpr int kSharedEntries = 2048;  // most entries of a bias table that warps keep in shared memory

// A warp: delta of one row.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) attend_bwd_delta_kernel(AttendBwd p, float* delta) {
  const Attend& a = p.a;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kMaxThreads / 32) + threadIdx.x / 32;
  if (row >= a.batch * a.n_q * a.heads) return;
  const int64_t token = row / a.heads, head = row % a.heads;
  const T* out = row_of<T>(p.out, token / a.n_q, token % a.n_q, head);
  const T* dout = row_of<T>(p.dout, token / a.n_q, token % a.n_q, head);
  float sum = 0.0f;
  for (int d = threadIdx.x % 32; d < a.head_dim_v; d += 32) {
    sum = fmaf(static_cast<float>(out[d]), static_cast<float>(dout[d]), sum);
  }
  for (int lanes = 16; lanes; lanes /= 2) sum += simt::shfl_xor(sum, lanes);
  if (p.dlse) sum -= static_cast<const float*>(p.dlse)[token * p.lse_stride_n + head];
  if (threadIdx.x % 32 == 0) delta[row] = sum;
}

// A warp: dbias of one head and entry, the sum over `blocks` partial tables [blocks, heads, bias_size].
__global__ void __launch_bounds__(kMaxThreads)
    attend_bwd_bias_kernel(Attend a, const float* partial, float* dbias, int blocks) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (kMaxThreads / 32) + threadIdx.x / 32;
  const int64_t size = a.heads * a.bias_size;
  if (at >= size) return;
  float sum = 0.0f;
  for (int block = threadIdx.x % 32; block < blocks; block += 32) sum += partial[block * size + at];
  for (int lanes = 16; lanes; lanes /= 2) sum += simt::shfl_xor(sum, lanes);
  if (threadIdx.x % 32 == 0) dbias[at] = sum;
}

// A block: the gradient of one extra row, summed over the chunks of one batch element and key head.
__global__ void __launch_bounds__(kMaxThreads)
    attend_bwd_extra_kernel(AttendBwd p, const float* partial, KeyPass pass) {
  const Attend& a = p.a;
  uint32_t block = blockIdx.x;
  const int extra = take_index(block, a.n_extra), head = take_index(block, a.kv_heads);
  const int slots = pass.edge_slots + pass.extra_slots, dims = a.head_dim + a.head_dim_v;
  const bool edge = extra < a.edge_row;
  const int first = edge ? 0 : pass.edge_slots + extra - a.edge_row,
            last = edge ? pass.edge_slots : first + 1;
  const float* chunks =
      partial + (static_cast<int64_t>(block) * a.kv_heads + head) * pass.chunks * slots * dims;
  for (int col = threadIdx.x; col < dims; col += kMaxThreads) {
    float sum = 0.0f;
    for (int64_t chunk = 0; chunk < pass.chunks; ++chunk) {
      for (int slot = first; slot < last; ++slot) sum += chunks[(chunk * slots + slot) * dims + col];
    }
    const bool of_k = col < a.head_dim;
    const Rows& rows = of_k ? p.dextra_k : p.dextra_v;
    if (rows.data) row_of<float>(rows, block, extra, head)[of_k ? col : col - a.head_dim] = sum;
  }
}

// Bytes of a block that owns `rows` of one side and streams `inner` slots of the other.
template <class T, class Own, class Inner>
size_t bwd_bytes(const Tiling& t, int rows, int inner) {
  return smem_of<Own>(rows) + smem_of<Inner>(inner) + smem_of<T>(rows * t.d_stride) +
         smem_of<T>(rows * t.dv_stride) + smem_of<T>(inner * t.d_stride) + smem_of<T>(inner * t.dv_stride);
}

template <class T, int kCols>
void cut_queries(const AttendBwd& p, Tiling t, BwdPlan& plan) {
  const Attend& a = p.a;
  const int entries = static_cast<int>(a.bias_size);
  plan.q_cut = cut_for(a.plan.q_slots, t.k_total, kInner, [&](int rows, int stages) {
    return bwd_bytes<T, QuerySlot, KeySlot>(t, rows, stages * kInner);
  });
  bool shared = false;
  if (p.dbias && entries <= kSharedEntries) {  // tables may cost a buffer, but no rows
    const Cut with = cut_for(a.plan.q_slots, t.k_total, kInner, [&](int rows, int stages) {
      return bwd_bytes<T, QuerySlot, KeySlot>(t, rows, stages * kInner) +
             smem_of<float>(rows / 16 * table_floats(entries));
    });
    shared = with.rows == plan.q_cut.rows;
    if (shared) plan.q_cut = with;
  }
  t.q_tiles = plan.q_cut.own_tiles;
  t.k_tiles = plan.q_cut.inner_tiles;
  t.stages = plan.q_cut.stages;
  t.parts = ceil_div(t.d_pad, kCols);
  t.store_pairs = alignment(p.dq, sizeof(T)) >= 4;
  plan.q = t;

  const int64_t windows = a.batch * a.plan.n_rows;
  plan.chunks = static_cast<int32_t>(windows);
  plan.tables = plan.partial = plan.bias;
  if (!p.dbias || !plan.q_cut.rows) return;
  // Enough warps to fill the device, few enough tables to stay below 64 Mi floats.
  const int64_t warps = plan.q_cut.rows / 16, wanted = int64_t{32} * simt::multiprocessors() / warps;
  const int64_t blocks = int64_t{a.heads} * t.q_tiles;
  const int64_t scratch = shared ? 0 : warps * table_floats(entries);
  const int64_t enough = ceil_div(wanted, blocks * t.parts);
  const int64_t affordable = std::max<int64_t>(1, (int64_t{1} << 26) / (blocks * (entries + scratch)));
  const int64_t per_chunk = ceil_div(windows, std::min({windows, enough, affordable}));
  plan.chunks = ceil_div(windows, per_chunk);                              // none of them empty
  plan.tables = (plan.bias + plan.chunks * blocks * entries + 3) / 4 * 4;  // rows of float2
  plan.partial = plan.tables + plan.chunks * blocks * scratch;
}

// The pass that owns keys, of p.a.plan; extra_only: of its extra rows alone.
template <class T, int kCols>
KeyPass cut_keys(const AttendBwd& p, Tiling t, bool extra, bool extra_only) {
  const Attend& a = p.a;
  KeyPass pass{};
  pass.extra_only = extra_only;
  const int own = (extra_only ? 0 : a.plan.k_slots) + a.n_extra - a.edge_row;
  const int64_t group = a.kv_heads ? a.heads / a.kv_heads : 1;
  pass.rows_each = 1;
  if (extra_only) {
    const int64_t per_row = std::max<int64_t>(1, a.batch * a.kv_heads);
    const int64_t wanted = std::max<int64_t>(1, int64_t{32} * simt::multiprocessors() / per_row);
    pass.rows_each = ceil_div(a.plan.n_rows, std::min(a.plan.n_rows, wanted));
  }
  pass.chunks = ceil_div(a.plan.n_rows, pass.rows_each);
  const int64_t inner = std::min<int64_t>(2 * kInner, a.plan.q_slots * group * pass.rows_each);
  pass.cut = cut_for(own, static_cast<int>(inner), kInner, [&](int rows, int stages) {
    return bwd_bytes<T, KeySlot, QuerySlot>(t, rows, stages * kInner) +
           (extra ? smem_of<float>(rows * kCols) : 0);
  });
  t.k_tiles = pass.cut.own_tiles;
  t.q_tiles = ceil_div(a.plan.q_slots, kInner);
  t.stages = pass.cut.stages;
  t.parts = ceil_div(std::max(t.d_pad, t.dv_pad), kCols);
  t.store_pairs = std::min(alignment(p.dk, sizeof(T)), alignment(p.dv, sizeof(T))) >= 4;
  pass.t = t;
  pass.edge_slots = extra && a.edge_row ? t.k_tiles : 0;
  pass.extra_slots = extra ? a.n_extra - a.edge_row : 0;
  return pass;
}

// p for the pass that owns keys: without what the rows of key_plan do not have.
AttendBwd of_keys(AttendBwd p) {
  p.a.plan = p.key_plan;
  p.a.n_extra = p.a.edge_row = 0;
  p.a.mask = nullptr;
  p.dextra_k.data = p.dextra_v.data = nullptr;
  return p;
}

template <class T, int kCols>
BwdPlan plan_of(const AttendBwd& p) {
  const Attend& a = p.a;
  BwdPlan plan{};
  Tiling t = tiling_of<T>(a, kCols);
  t.out_align = alignment(p.dout, sizeof(T));
  plan.bias = plan.delta + a.batch * a.n_q * a.heads;
  cut_queries<T, kCols>(p, t, plan);
  const bool extra = a.n_extra && (p.dextra_k.data || p.dextra_v.data);
  plan.own_keys = p.key_plan.n_rows == 0;
  if (plan.own_keys) {
    plan.keys = plan.extra = cut_keys<T, kCols>(p, t, extra, false);
  } else {
    plan.keys = cut_keys<T, kCols>(of_keys(p), t, false, false);
    if (extra) plan.extra = cut_keys<T, kCols>(p, t, true, true);
  }
  const int64_t slots = plan.extra.edge_slots + plan.extra.extra_slots;
  plan.total = plan.partial + a.batch * a.kv_heads * plan.extra.chunks * slots * (a.head_dim + a.head_dim_v);
  return plan;
}

template <class T, int kCols>
cudaError_t backward_keys(const AttendBwd& p, const BwdPlan& plan, const BwdBuffers& buffers,
                          cudaStream_t stream) {
  if (plan.own_keys) return backward_kv<T, kCols>(p, plan.keys, buffers, stream);
  BwdBuffers no_extra = buffers;
  no_extra.extra = nullptr;
  const cudaError_t error = backward_kv<T, kCols>(of_keys(p), plan.keys, no_extra, stream);
  if (error != cudaSuccess || !buffers.extra) return error;
  return backward_kv<T, kCols>(p, plan.extra, buffers, stream);
}

template <class T, int kCols>
cudaError_t backward(const AttendBwd& p, float* workspace, cudaStream_t stream) {
  const Attend& a = p.a;
  const BwdPlan plan = plan_of<T, kCols>(p);
  const bool extra = plan.extra.edge_slots + plan.extra.extra_slots;
  if (!plan.q_cut.rows || !plan.keys.cut.rows || (extra && !plan.extra.cut.rows))
    return cudaErrorInvalidConfiguration;
  BwdBuffers buffers{workspace + plan.delta, nullptr, nullptr, nullptr};
  if (p.dbias) buffers.bias = workspace + plan.bias;
  if (plan.partial > plan.tables) buffers.tables = workspace + plan.tables;
  if (extra) buffers.extra = workspace + plan.partial;

  constexpr int kWarps = kMaxThreads / 32;
  cudaError_t error = launch_blocks(attend_bwd_delta_kernel<T>, ceil_div(a.batch * a.n_q * a.heads, kWarps),
                                    kMaxThreads, 0, stream, p, buffers.delta);
  if (error == cudaSuccess) error = backward_q<T, kCols>(p, plan, buffers, stream);
  if (error == cudaSuccess) error = backward_keys<T, kCols>(p, plan, buffers, stream);
  if (p.dbias && error == cudaSuccess) {
    error = launch_blocks(attend_bwd_bias_kernel, ceil_div(a.heads * a.bias_size, kWarps), kMaxThreads, 0,
                          stream, a, static_cast<const float*>(buffers.bias), static_cast<float*>(p.dbias),
                          plan.chunks * plan.q.q_tiles);
  }
  if (extra && error == cudaSuccess) {
    error = launch_blocks(attend_bwd_extra_kernel, a.batch * a.kv_heads * a.n_extra, kMaxThreads, 0, stream,
                          p, static_cast<const float*>(buffers.extra), plan.extra);
  }
  return error;
}

bool nothing_to_do(const Attend& a) { return !a.batch || !a.heads || !a.plan.n_rows || !a.n_q; }

cudaError_t refuse_bwd(const AttendBwd& p) {
  const bool slots_differ = p.key_plan.n_rows && p.a.dropout_p > 0 && !p.a.drop_by_token;
  return slots_differ ? cudaErrorInvalidValue : refuse(p.a);
}

}  // namespace

int64_t attend_bwd_workspace(const AttendBwd& p) {
  if (nothing_to_do(p.a) || refuse_bwd(p) != cudaSuccess) return 0;
  int64_t floats = 0;
  dispatch(p.a, [&](auto type, auto cols) {
    floats = plan_of<decltype(type), decltype(cols)::value>(p).total;
    return cudaSuccess;
  });
  return floats * static_cast<int64_t>(sizeof(float));
}

int attend_bwd(const AttendBwd& p, void* workspace, void* stream) {
  if (nothing_to_do(p.a)) return cudaSuccess;
  const cudaError_t refused = refuse_bwd(p);
  if (refused != cudaSuccess) return refused;
  return dispatch(p.a, [&](auto type, auto cols) {
    return backward<decltype(type), decltype(cols)::value>(p, static_cast<float*>(workspace),
                                                           static_cast<cudaStream_t>(stream));
  });
}

}  // namespace vicinal::cuda
