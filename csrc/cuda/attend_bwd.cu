// attend, backward: how it is cut and launched, and the small kernels around the two passes (attend_bwd_q.cu,
// attend_bwd_kv.cu): delta before them, sums of their partial results in a fixed order after them.
#include "attend_bwd.cuh"

namespace vicinal::cuda {

namespace {

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

// Adds the chunks' bias gradients into the first, and writes the codes of plan row 0 for the next kernel.
__global__ void __launch_bounds__(kMaxThreads)
    attend_bwd_chunks_kernel(Attend a, BwdBuffers buffers, int chunks, int k_total) {
  const int64_t size = static_cast<int64_t>(a.heads) * a.plan.q_slots * k_total;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x;
  if (i < a.plan.q_slots + a.plan.k_slots) {
    const PlanRow& row = a.plan.rows[0];
    const int slot = static_cast<int>(i), key = slot - a.plan.q_slots;
    buffers.codes[i] = key < 0 ? slot_entry(a.plan.axes, row.q_begin, row.q_extent, slot).code
                               : slot_entry(a.plan.axes, row.k_begin, row.k_extent, key).code;
  }
  if (i >= size) return;
  float sum = buffers.bias[i];
  for (int chunk = 1; chunk < chunks; ++chunk) sum += buffers.bias[chunk * size + i];
  buffers.bias[i] = sum;
}

// A warp: dbias of one head and entry, the sum over the pairs of slots with this bias index.
__global__ void __launch_bounds__(kMaxThreads)
    attend_bwd_bias_kernel(Attend a, BwdBuffers buffers, float* dbias, int k_total) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (kMaxThreads / 32) + threadIdx.x / 32;
  if (at >= a.heads * a.bias_size) return;
  const int64_t entry = at % a.bias_size;
  const int q_slots = a.plan.q_slots, k_slots = a.plan.k_slots;
  const float* gradients = buffers.bias + at / a.bias_size * q_slots * k_total;
  const int32_t* k_codes = buffers.codes + q_slots;
  const int extra =
      static_cast<int>(entry - (a.bias_size - (k_total - k_slots)));  // >= 0: an extra row's own entry
  int32_t lowest = k_codes[0], highest = k_codes[0];
  for (int j = 1; j < k_slots; ++j) {
    lowest = smaller(lowest, k_codes[j]);
    highest = -smaller(-highest, -k_codes[j]);
  }
  float sum = 0.0f;
  for (int i = threadIdx.x % 32; i < q_slots; i += 32) {
    const float* row = gradients + static_cast<int64_t>(i) * k_total;
    if (extra >= 0) {
      sum += row[k_slots + extra];
      continue;
    }
    const int32_t wanted = static_cast<int32_t>(entry) - buffers.codes[i];
    if (wanted < lowest || wanted > highest) continue;
    for (int j = 0; j < k_slots; ++j) {
      if (bias_index(buffers.codes[i], k_codes[j]) == entry) sum += row[j];
    }
  }
  for (int lanes = 16; lanes; lanes /= 2) sum += simt::shfl_xor(sum, lanes);
  if (threadIdx.x % 32 == 0) dbias[at] = sum;
}

// A block: the gradient of one extra row, summed over the windows of one batch element and head.
__global__ void __launch_bounds__(kMaxThreads)
    attend_bwd_extra_kernel(AttendBwd p, const float* partial, int edge_slots, int extra_slots) {
  const Attend& a = p.a;
  uint32_t block = blockIdx.x;
  const int extra = take_index(block, a.n_extra), head = take_index(block, a.heads);
  const int slots = edge_slots + extra_slots, dims = a.head_dim + a.head_dim_v;
  const bool edge = extra < a.edge_row;
  const int first = edge ? 0 : edge_slots + extra - a.edge_row, last = edge ? edge_slots : first + 1;
  const float* windows =
      partial + (static_cast<int64_t>(block) * a.heads + head) * a.plan.n_rows * slots * dims;
  for (int col = threadIdx.x; col < dims; col += kMaxThreads) {
    float sum = 0.0f;
    for (int64_t row = 0; row < a.plan.n_rows; ++row) {
      for (int slot = first; slot < last; ++slot) sum += windows[(row * slots + slot) * dims + col];
    }
    const bool of_k = col < a.head_dim;
    const Rows& rows = of_k ? p.dextra_k : p.dextra_v;
    if (rows.data) row_of<float>(rows, block, extra, head)[of_k ? col : col - a.head_dim] = sum;
  }
}

template <class T, int kCols>
BwdPlan plan_of(const AttendBwd& p) {
  const Attend& a = p.a;
  BwdPlan plan{};
  Tiling t = tiling_of<T>(a, kCols);
  t.out_align = alignment(p.dout, sizeof(T));
  const bool extra = a.n_extra && (p.dextra_k.data || p.dextra_v.data);
  auto bytes = [&](int rows, int stages) {
    return smem_of<QuerySlot>(rows) + smem_of<KeySlot>(stages * kInner) + smem_of<T>(rows * t.d_stride) +
           smem_of<T>(rows * t.dv_stride) + smem_of<T>(stages * kInner * t.d_stride) +
           smem_of<T>(stages * kInner * t.dv_stride);
  };
  plan.q = plan.kv = t;
  plan.q_cut = cut_for(a.plan.q_slots, t.k_total, kInner, bytes);
  plan.q.q_tiles = plan.q_cut.own_tiles;
  plan.q.k_tiles = plan.q_cut.inner_tiles;
  plan.q.stages = plan.q_cut.stages;
  plan.q.parts = ceil_div(t.d_pad, kCols);
  plan.q.store_pairs = alignment(p.dq, sizeof(T)) >= 4;
  plan.kv_cut = cut_for(t.k_total, a.plan.q_slots, kInner, [&](int rows, int stages) {
    return smem_of<KeySlot>(rows) + smem_of<QuerySlot>(stages * kInner) - smem_of<QuerySlot>(rows) -
           smem_of<KeySlot>(stages * kInner) + bytes(rows, stages) +
           (extra ? smem_of<float>(rows * kCols) : 0);
  });
  plan.kv.k_tiles = plan.kv_cut.own_tiles;
  plan.kv.q_tiles = plan.kv_cut.inner_tiles;
  plan.kv.stages = plan.kv_cut.stages;
  plan.kv.parts = ceil_div(std::max(t.d_pad, t.dv_pad), kCols);
  plan.kv.store_pairs = std::min(alignment(p.dk, sizeof(T)), alignment(p.dv, sizeof(T))) >= 4;

  const int64_t windows = a.batch * a.plan.n_rows;
  const int64_t partial = static_cast<int64_t>(a.heads) * a.plan.q_slots * t.k_total;
  plan.chunks = static_cast<int32_t>(windows);
  if (p.dbias) {  // enough blocks to fill the device, few enough partial sums to stay below 64 Mi floats
    const int64_t blocks = int64_t{8} * simt::multiprocessors();
    const int64_t enough =
        ceil_div(blocks, std::max<int64_t>(1, int64_t{a.heads} * plan.q.q_tiles * plan.q.parts));
    const int64_t affordable = std::max<int64_t>(1, (int64_t{1} << 26) / partial);
    const int64_t per_chunk = ceil_div(windows, std::min({windows, enough, affordable}));
    plan.chunks = ceil_div(windows, per_chunk);  // none of them empty
  }
  plan.edge_slots = extra && a.edge_row ? plan.kv.k_tiles : 0;
  plan.extra_slots = extra ? a.n_extra - a.edge_row : 0;
  plan.bias = plan.delta + a.batch * a.n_q * a.heads;
  plan.codes = plan.bias + (p.dbias ? plan.chunks * partial : 0);
  plan.extra = plan.codes + (p.dbias ? a.plan.q_slots + a.plan.k_slots : 0);
  const int64_t slots = plan.edge_slots + plan.extra_slots;
  plan.total = plan.extra + windows * a.heads * slots * (a.head_dim + a.head_dim_v);
  return plan;
}

template <class T, int kCols>
cudaError_t backward(const AttendBwd& p, float* workspace, cudaStream_t stream) {
  const Attend& a = p.a;
  const BwdPlan plan = plan_of<T, kCols>(p);
  if (!plan.q_cut.rows || !plan.kv_cut.rows) return cudaErrorInvalidConfiguration;
  BwdBuffers buffers{workspace + plan.delta, nullptr, nullptr, nullptr};
  if (p.dbias) {
    buffers.bias = workspace + plan.bias;
    buffers.codes = reinterpret_cast<int32_t*>(workspace + plan.codes);
  }
  if (plan.edge_slots + plan.extra_slots) buffers.extra = workspace + plan.extra;

  constexpr int kWarps = kMaxThreads / 32;
  cudaError_t error = launch_blocks(attend_bwd_delta_kernel<T>, ceil_div(a.batch * a.n_q * a.heads, kWarps),
                                    kMaxThreads, 0, stream, p, buffers.delta);
  if (error == cudaSuccess) error = backward_q<T, kCols>(p, plan, buffers, stream);
  if (error == cudaSuccess) error = backward_kv<T, kCols>(p, plan, buffers, stream);
  if (p.dbias) {
    const int64_t size = static_cast<int64_t>(a.heads) * a.plan.q_slots * plan.q.k_total;
    const int64_t threads = std::max<int64_t>(size, a.plan.q_slots + a.plan.k_slots);
    if (error == cudaSuccess) {
      error = launch_blocks(attend_bwd_chunks_kernel, ceil_div(threads, kMaxThreads), kMaxThreads, 0, stream,
                            a, buffers, plan.chunks, plan.q.k_total);
    }
    if (error == cudaSuccess) {
      error = launch_blocks(attend_bwd_bias_kernel, ceil_div(a.heads * a.bias_size, kWarps), kMaxThreads, 0,
                            stream, a, buffers, static_cast<float*>(p.dbias), plan.q.k_total);
    }
  }
  if (buffers.extra && error == cudaSuccess) {
    error = launch_blocks(attend_bwd_extra_kernel, a.batch * a.heads * a.n_extra, kMaxThreads, 0, stream, p,
                          static_cast<const float*>(buffers.extra), plan.edge_slots, plan.extra_slots);
  }
  return error;
}

bool nothing_to_do(const Attend& a) { return !a.batch || !a.heads || !a.plan.n_rows || !a.n_q; }

}  // namespace

int64_t attend_bwd_workspace(const AttendBwd& p) {
  if (nothing_to_do(p.a) || refuse(p.a) != cudaSuccess) return 0;
  int64_t floats = 0;
  dispatch(p.a, [&](auto type, auto cols) {
    floats = plan_of<decltype(type), decltype(cols)::value>(p).total;
    return cudaSuccess;
  });
  return floats * static_cast<int64_t>(sizeof(float));
}

int attend_bwd(const AttendBwd& p, void* workspace, void* stream) {
  if (nothing_to_do(p.a)) return cudaSuccess;
  const cudaError_t refused = refuse(p.a);
  if (refused != cudaSuccess) return refused;
  return dispatch(p.a, [&](auto type, auto cols) {
    return backward<decltype(type), decltype(cols)::value>(p, static_cast<float*>(workspace),
                                                           static_cast<cudaStream_t>(stream));
  });
}

}  // namespace vicinal::cuda
