// joint attention: weights, gradients of scores, and the kernels that go element by element.
//
// A block owns 64 x 64 pairs of a group, a warp 16 queries. The gradient of the weights is a product over all
// columns of the values; it stays in registers until it meets the slope of the activation.
#include "joint.cuh"

namespace vicinal::cuda {

namespace {

constexpr int kTiles = kSide / 8;
using Square = float[kTiles][4];

struct Activated {
  float value, slope;
};

__device__ inline Activated activate(JointActivation activation, float s) {
  if (activation == kJointRelu2) {
    const float r = s > 0.0f ? s : 0.0f;
    return {r * r, 2.0f * r};
  }
  constexpr float kTwoPi = 6.283185307179586f, kMu = 0.7071067811865476f, kRoot = 2.5066282746310002f;
  const float x = s - kMu;
  return {0.5f + 0.5f * erff(x * kRoot), 1.4142135623730951f * simt::ex2(-kTwoPi * x * x * kLog2E)};
}

template <class T>
__device__ void multiply(Square& y, T* left, T* right, const Operand& of_left, const Operand& of_right,
                         const Tokens& rows, const Tokens& cols, const float* seen) {
  for (int k = 0; k * kSide < of_left.width; ++k) {
    simt::sync_threads();
    read_tile(left, of_left, rows, 0, k, nullptr);
    read_tile(right, of_right, cols, 0, k, of_right.keys ? seen : nullptr);
    arrive();
    if (warp_row() >= rows.count) continue;
    product_nt(y, left + warp_row() * kRow<T>, kRow<T>, right, kRow<T>, slice_width(of_left.width, k),
               up_to_16(cols.count));
  }
}

template <class T>
__device__ void store_pairs(void* to, const Joint& a, const Tokens& rows, int key_tile, const Square& y) {
  using Stored = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
  Stored* at = static_cast<Stored*>(to) + (rows.sample * a.n + rows.begin) * a.group;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = warp_row() + lane_group() + e / 2 * 8;
      const int64_t col = int64_t{key_tile} * kSide + 8 * n + 2 * lane_pair() + e % 2;
      if (row < rows.count && col < a.group) at[row * a.group + col] = rounded<Stored>(y[n][e]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) joint_scores_kernel(const __grid_constant__ JointScores p) {
  const Joint& a = p.a;
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  T* left = carver.take<T>(kSide * kRow<T>);
  T* right = carver.take<T>(kSide * kRow<T>);
  float* seen = carver.take<float>(kSide);
  uint32_t block = blockIdx.x;
  const int key_tile = take_index(block, p.tiles), tile = take_index(block, p.tiles);
  const int64_t groups = (a.n + a.group - 1) / a.group, group = block % groups, batch = block / groups;
  const Tokens rows = group_tile(a, batch, group, tile), cols = group_tile(a, batch, group, key_tile);
  if (rows.count <= 0 || cols.count <= 0 || (a.causal && key_tile > tile)) return;
  for (int i = threadIdx.x; i < kSide; i += kMaxThreads) {
    const bool there = i < cols.count && !(a.ignored && a.ignored[batch * a.n + cols.begin + i]);
    seen[i] = there ? 1.0f : 0.0f;
  }
  Square s = {}, grad = {};
  multiply(s, left, right, p.quad_q, p.quad_k, rows, cols, seen);
  for (int i = 0; p.slopes && i < 2; ++i) {
    if (p.dout[i].x.data) multiply(grad, left, right, p.dout[i], p.values[i], rows, cols, seen);
  }
  const uint32_t threshold = dropout_threshold(a.dropout_p);
  const uint64_t seed = threshold ? static_cast<uint64_t>(*a.seed) : 0;
  const float kept = static_cast<float>(1.0 / (1.0 - a.dropout_p));
  const float* bias = static_cast<const float*>(a.bias);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = warp_row() + lane_group() + e / 2 * 8, col = 8 * n + 2 * lane_pair() + e % 2;
      const int64_t i = rows.first + row, j = cols.first + col;
      if (row >= rows.count || col >= cols.count || seen[col] == 0.0f || (a.causal && j > i)) {
        s[n][e] = grad[n][e] = 0.0f;
        continue;
      }
      float score = static_cast<float>(a.quad_scale) * s[n][e];
      if (bias) score += bias[i * a.group + j];
      float z = 1.0f;
      if (threshold) {
        const uint2 words = dropout_pair(seed, static_cast<uint32_t>(batch),
                                         static_cast<int32_t>(rows.begin + row), static_cast<int>(j / 2 * 2));
        z = (j % 2 ? words.y : words.x) >= threshold ? kept : 0.0f;
      }
      const Activated act = activate(a.activation, score);
      s[n][e] = z * act.value;
      grad[n][e] *= z * act.slope;
    }
  }
  store_pairs<T>(p.weights, a, rows, key_tile, s);
  if (p.slopes) store_pairs<T>(p.slopes, a, rows, key_tile, grad);
}

// A thread: one element of the state of a sample, group after group (or backwards).
__global__ void __launch_bounds__(kMaxThreads) joint_state_kernel(JointState p, int blocks_each) {
  const Joint& a = p.a;
  uint32_t block = blockIdx.x;
  const int64_t width = a.u.data ? 2 * a.dim_v : a.dim_v, size = a.dim * width;
  const int64_t element = static_cast<int64_t>(take_index(block, blocks_each)) * kMaxThreads + threadIdx.x;
  const int64_t batch = block;
  if (element >= size) return;
  const int64_t row = element / width, col = element % width;
  const float* sums = p.sums[col >= a.dim_v];
  const int64_t groups = (a.n + a.group - 1) / a.group, states = a.causal ? groups : 1;
  float* state = p.state + batch * states * size + element;
  const int64_t slots = slots_of(p.runs, a.n), all = int64_t{a.dim} * a.dim_v;
  const float* own = sums ? sums + batch * p.runs.slots_each * all + row * a.dim_v + col % a.dim_v : nullptr;
  float sum = 0.0f;
  for (int64_t step = 0; step < slots; ++step) {
    const int64_t slot = p.backwards ? slots - 1 - step : step, group = slot / p.runs.pieces;
    const bool first = p.backwards ? slot + 1 == slots || slot % p.runs.pieces == p.runs.pieces - 1
                                   : slot % p.runs.pieces == 0;
    if (a.causal && first) state[group * size] = p.factor * sum;
    if (own) sum += own[slot * all];
  }
  if (!a.causal) *state = p.factor * sum;
}

__global__ void __launch_bounds__(kMaxThreads) joint_gate_kernel(JointGate p) {
  const Joint& a = p.a;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x, each = a.n * a.dim_v;
  if (i >= a.batch * each) return;
  const int64_t batch = i / each, token = i % each / a.dim_v;
  const int col = static_cast<int>(i % a.dim_v);
  const auto at = [&](const Matrix& m) { return load_matrix(m, a.dtype, batch, token, col); };
  const Gate gate(at(a.v), at(a.u), at(p.inner_v), at(p.inner_u));
  const float dy = at(p.dout);
  const Strided x{p.to[0], 0, 0, 0, 1}, y{p.to[1], 0, 0, 0, 1};
  store_value(x, p.dtype, i, gate.slope(dy) * gate.u);
  store_value(y, p.dtype, i, dy * gate.v * gate.t);
}

// A thread: one entry of dbias, over all groups in order.
__global__ void __launch_bounds__(kMaxThreads) joint_bias_kernel(JointBias p) {
  const Joint& a = p.a;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x;
  if (entry >= a.group * a.group) return;
  const int64_t i = entry / a.group, j = entry % a.group;
  float sum = 0.0f;
  for (int64_t batch = 0; batch < a.batch && !(a.causal && j > i); ++batch) {
    for (int64_t first = 0; first < a.n; first += a.group) {
      if (first + i >= a.n || first + j >= a.n) continue;
      sum += load_value(p.slopes, p.dtype, (batch * a.n + first + i) * a.group + j);
    }
  }
  p.dbias[entry] = sum;
}

}  // namespace

template <class T>
cudaError_t launch_joint_scores(const JointScores& p, cudaStream_t stream) {
  const size_t smem = 2 * smem_of<T>(kSide * kRow<T>) + smem_of<float>(kSide);
  const int64_t blocks = p.a.batch * p.a.groups() * p.tiles * p.tiles;
  return launch_blocks(joint_scores_kernel<T>, blocks, kMaxThreads, smem, stream, p);
}

template cudaError_t launch_joint_scores<bf16>(const JointScores&, cudaStream_t);
template cudaError_t launch_joint_scores<tf32>(const JointScores&, cudaStream_t);
template cudaError_t launch_joint_scores<float>(const JointScores&, cudaStream_t);

cudaError_t launch_joint_state(const JointState& p, cudaStream_t stream) {
  const int each = ceil_div(p.a.dim * p.a.width(), kMaxThreads);
  return launch_blocks(joint_state_kernel, p.a.batch * each, kMaxThreads, 0, stream, p, each);
}

cudaError_t launch_joint_gate(const JointGate& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.a.batch * p.a.n * p.a.dim_v, kMaxThreads);
  return launch_blocks(joint_gate_kernel, blocks, kMaxThreads, 0, stream, p);
}

cudaError_t launch_joint_bias(const JointBias& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.a.group * p.a.group, kMaxThreads);
  return launch_blocks(joint_bias_kernel, blocks, kMaxThreads, 0, stream, p);
}

}  // namespace vicinal::cuda
