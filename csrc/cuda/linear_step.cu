// One token of causal linear attention on states in memory: a block takes a head, a thread a value (and every
// fourth feature), so that a state is read and written once. One launch that allocates nothing and reads
// nothing on the host, hence fit for CUDA graphs. Where nothing is normalised, blocks share the values of a
// head; z has one owner.
#include "linear.cuh"

namespace vicinal::cuda {

namespace {

constexpr int kValues = 64, kSplits = 4, kStepThreads = kValues * kSplits;

struct StepParts {
  LinearStep w;
  int32_t parts, K;
};

__global__ void __launch_bounds__(kStepThreads) linear_step_kernel(StepParts p) {
  const Linear& a = p.w.a;
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  float* f = carver.take<float>(p.K);
  float* features = carver.take<float>(p.K);
  float* partial = carver.take<float>(kStepThreads);
  uint32_t block = blockIdx.x;
  const int part = take_index(block, p.parts), head = take_index(block, a.heads), tid = threadIdx.x;
  const int64_t batch = block, index = batch * a.heads + head;
  const int shared = head / (a.heads / a.heads_qk);
  float keep = 1.0f;
  if (a.decay) {
    const float* g = static_cast<const float*>(a.decay);
    keep = simt::ex2(g[batch * a.decay_stride_b + head * a.decay_stride_h] * kLog2E);
  }
  const int64_t q = offset_of(a.q, batch, 0, shared), k = offset_of(a.k, batch, 0, shared);
  float den = 0.0f;
  for (int i = tid; i < p.K; i += kStepThreads) {
    const bool there = i < a.dim;
    f[i] = 1.0f, features[i] = static_cast<float>(a.constant);
    if (there) {
      const float x = load_value(a.q.data, a.dtype, q + i * a.q.stride_d);
      const float y = load_value(a.k.data, a.dtype, k + i * a.k.stride_d);
      f[i] = static_cast<float>(a.scale) * mapped(a.map_q, static_cast<float>(a.param_q), x).x;
      features[i] = mapped(a.map_k, static_cast<float>(a.param_k), y).x;
    }
    if (!a.normalize) continue;
    float* z = static_cast<float*>(p.w.z) + index * p.K + i;
    const float sum = fmaf(keep, *z, features[i]);
    *z = sum;
    den = fmaf(f[i], sum, den);
  }
  partial[tid] = den;
  simt::sync_threads();
  den = static_cast<float>(a.eps);
  for (int i = 0; i < kStepThreads && a.normalize; ++i) den += partial[i];
  const float factor = a.normalize ? inverse_of(den) : 1.0f;

  const int first = p.parts > 1 ? part * kValues : 0, last = p.parts > 1 ? first + kValues : a.dim_v;
  float* s = static_cast<float*>(p.w.s) + index * p.K * a.dim_v;
  for (int base = first; base < last && base < a.dim_v; base += kValues) {
    const int col = base + tid % kValues;
    float sum = 0.0f;
    if (col < a.dim_v) {
      const float v = load_value(a.v.data, a.dtype, offset_of(a.v, batch, 0, head) + col * a.v.stride_d);
#pragma unroll 4
      for (int i = tid / kValues; i < p.K; i += kSplits) {
        float* at = s + static_cast<int64_t>(i) * a.dim_v + col;
        const float x = fmaf(keep, *at, features[i] * v);
        *at = x;
        sum = fmaf(f[i], x, sum);
      }
    }
    simt::sync_threads();
    partial[tid] = sum;
    simt::sync_threads();
    if (tid < kValues && col < a.dim_v) {
      for (int i = 1; i < kSplits; ++i) sum += partial[tid + i * kValues];
      const int64_t at = offset_of(p.w.out, batch, 0, head) + col * p.w.out.stride_d;
      store_value(p.w.out, a.dtype, at, factor * sum);
    }
  }
}

}  // namespace

int linear_step(const LinearStep& p, void* stream) {
  const Linear& a = p.a;
  if (!a.batch || !a.heads) return cudaSuccess;
  if (a.dtype == kF64 || a.dim < 1 || a.dim_v < 1) return cudaErrorInvalidValue;
  StepParts parts{p, a.normalize ? 1 : ceil_div(a.dim_v, kValues), a.dim + (a.constant != 0)};
  const size_t smem = 2 * smem_of<float>(parts.K) + smem_of<float>(kStepThreads);
  return launch_blocks(linear_step_kernel, a.batch * a.heads * parts.parts, kStepThreads, smem,
                       static_cast<cudaStream_t>(stream), parts);
}

}  // namespace vicinal::cuda
