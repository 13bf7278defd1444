// linear attention: sums of runs, and the kernels that go through them in order.
//
// A block of the sums owns 64 features and 64 values of one run and head, a warp 16 features, and takes the
// run's tokens 64 at a time. Runs are a part of the problem alone, their sums are added up by a second kernel
// in the order of the tokens, and nothing is atomic.
#include "linear_kernels.cuh"

namespace vicinal::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(kMaxThreads) linear_sums_kernel(const __grid_constant__ LinearSums p) {
  constexpr int N = kSide / 8;
  const Linear& a = p.a;
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  T* left = carver.take<T>(kSide * kRow<T>);
  T* right = carver.take<T>(kSide * kRow<T>);
  float* numbers = carver.take<float>(4 * kSide);
  float *factors = numbers, *slopes = factors + kSide, *weighted = slopes + kSide, *of_z = weighted + kSide;
  const Decays decays{carver.take<float>(kRunTiles * kSide), carver.take<float>(kRunTiles * kSide),
                      carver.take<float>(kRunTiles), a.decay != nullptr};

  uint32_t block = blockIdx.x;
  const int products = p.k_slices * p.v_slices, part = take_index(block, products + p.z_slices);
  const int head = take_index(block, a.heads);
  const Run run = run_of(p.runs, block);
  if (run.count == 0) return;
  const bool product = part < products;
  const int k_slice = product ? part / p.v_slices : part - products, v_slice = part % p.v_slices;
  const bool with_z = p.to.z_size && (!product || (v_slice == 0 && !p.z_slices));
  const Operand& of_k = product ? p.left : p.left_den;
  const bool active = warp_row() < of_k.width - k_slice * kSide;
  decays.load(a, p.runs, run, head);
  float c[N][4] = {}, z = 0.0f;
  for (int tile = 0; tile * p.runs.tile < run.count; ++tile) {
    const Tokens t = tokens_of(p.runs, run, tile);
    p.numbers.load(a, t, head, p.queries, factors, slopes);
    simt::sync_threads();
    for (int i = threadIdx.x; i < kSide; i += blockDim.x) {
      const float w = !decays.on ? 1.0f : p.queries ? decays.from_start(tile, i) : decays.to_end(tile, i);
      weighted[i] = factors[i] * w;
      of_z[i] = p.queries ? slopes[i] * w : w;
    }
    read_tile(left, of_k, t, head, k_slice, needs_factors(a, of_k) ? factors : nullptr);
    simt::sync_threads();
    const bool plain = !decays.on && !needs_factors(a, p.right);
    if (product) read_tile(right, p.right, t, head, v_slice, plain ? nullptr : weighted);
    arrive();
    if (product && active) {
      product_nn<true>(c, left + warp_row(), kRow<T>, right, kRow<T>, up_to_16(t.count),
                       slice_width(p.right.width, v_slice));
    }
    if (with_z && static_cast<int>(threadIdx.x) < slice_width(of_k.width, k_slice)) {
      for (int i = 0; i < t.count; ++i) z = fmaf(of_z[i], widened(left[i * kRow<T> + threadIdx.x]), z);
    }
    simt::sync_threads();
  }

  float* s = p.to.of_run(run.slot, head);
  if (with_z) {
    const int col = k_slice * kSide + threadIdx.x;
    if (threadIdx.x < kSide && col < p.to.z_size) s[p.to.s_size + col] = z;
  }
  if (part == 0 && p.keep && threadIdx.x == 0) {
    p.keep[run.slot * a.heads + head] = decays.on ? Decays::exp(decays.sum(0, kRunTiles)) : 1.0f;
  }
  if (!product) return;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = k_slice * kSide + warp_row() + lane_group() + e / 2 * 8;
      const int col = v_slice * kSide + 8 * n + 2 * lane_pair() + e % 2;
      if (row < p.left.width && col < p.right.width)
        s[static_cast<int64_t>(row) * p.right.width + col] = c[n][e];
    }
  }
}

// A thread: one element of the sums of one sequence and head, run after run, eight at a time so that their
// loads overlap.
__global__ void __launch_bounds__(kMaxThreads) linear_scan_kernel(LinearScan p, int blocks_each) {
  constexpr int kAhead = 8;
  const States& x = p.states;
  uint32_t block = blockIdx.x;
  const int64_t element = static_cast<int64_t>(take_index(block, blocks_each)) * kMaxThreads + threadIdx.x;
  const int head = take_index(block, x.heads);
  const int64_t sequence = block, index = sequence * x.heads + head;
  if (element >= x.s_size + x.z_size) return;
  const bool of_s = element < x.s_size;
  const int64_t at = of_s ? index * x.s_size + element : index * x.z_size + element - x.s_size;
  const float* initial = of_s ? p.initial_s : p.initial_z;
  float sum = initial ? initial[at] : 0.0f;
  const Span span = span_of(p.runs, sequence);
  const int64_t count = slots_of(p.runs, span.count);
  for (int64_t first = 0; first < count; first += kAhead) {
    float own[kAhead], keep[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= count) continue;
      const int64_t slot = span.slot + (p.backwards ? count - 1 - first - i : first + i);
      own[i] = x.of_run(slot, head)[element];
      keep[i] = p.keep ? p.keep[slot * x.heads + head] : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= count) continue;
      const int64_t slot = span.slot + (p.backwards ? count - 1 - first - i : first + i);
      if (p.write) x.of_run(slot, head)[element] = sum;
      sum = fmaf(keep[i], sum, own[i]);
    }
  }
  float* last = of_s ? p.last_s : p.last_z;
  float* copy = of_s ? p.copy_s : p.copy_z;
  if (last) last[at] = sum;
  if (copy) copy[at] = sum;
}

__global__ void __launch_bounds__(kMaxThreads) linear_rest_kernel(LinearRest p) {
  const int64_t rest = p.cu_seqlens[p.sequences], each = static_cast<int64_t>(p.heads) * p.dim;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kMaxThreads;
  for (int64_t i = blockIdx.x * int64_t{kMaxThreads} + threadIdx.x; i < (p.tokens - rest) * each; i += step) {
    const int64_t token = rest + i / each, h = i % each / p.dim, d = i % p.dim;
    const int64_t at = token * p.x.stride_n + h * p.x.stride_h + d * p.x.stride_d;
    store_value(p.x, p.dtype, at, p.value);
  }
}

// A block: one run and head.
__global__ void __launch_bounds__(kMaxThreads) linear_decay_grad_kernel(LinearDecayGrad p) {
  constexpr int kEach = kRunTiles * kSide / 32;
  const Linear& a = p.a;
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  float* of_warps = carver.take<float>(kMaxThreads / 32);
  uint32_t block = blockIdx.x;
  const int head = take_index(block, a.heads), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Run run = run_of(p.runs, block);
  if (run.count == 0) return;
  const Sums before = p.states.at(run.slot, head), grad = p.grads.at(run.slot, head);
  float overlap = 0.0f;
  for (int64_t i = threadIdx.x; i < p.states.s_size; i += kMaxThreads)
    overlap = fmaf(before.s[i], grad.s[i], overlap);
  for (int64_t i = threadIdx.x; i < p.states.z_size; i += kMaxThreads)
    overlap = fmaf(before.z[i], grad.z[i], overlap);
  for (int lanes = 16; lanes; lanes /= 2) overlap += simt::shfl_xor(overlap, lanes);
  if (lane == 0) of_warps[warp] = overlap;
  simt::sync_threads();
  if (warp != 0) return;
  overlap = 0.0f;
  for (int i = 0; i < kMaxThreads / 32; ++i) overlap += of_warps[i];

  const int64_t base = (run.sample * a.heads + head) * a.n_k + run.begin, all = a.batch * a.heads * a.n_k;
  float own[kEach] = {}, states[kEach] = {};  // lane l has the tokens from kEach l on
  float after = 0.0f, until = 0.0f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = lane * kEach + i;
    for (int part = 0; at < run.count && part < p.parts; ++part) {
      const int64_t from = part * all + base + at;
      states[i] += p.of_states[from];
      own[i] += p.of_queries[from] - (p.of_keys[from] - p.of_states[from]);
    }
    after += own[i], until += states[i];
  }
  const float own_sum = after, state_sum = until;
  for (int step = 1; step < 32; step *= 2) {  // sums over the lanes from this one on, and up to it
    const float higher = simt::shfl(after, (lane + step) & 31), lower = simt::shfl(until, (lane - step) & 31);
    if (lane + step < 32) after += higher;
    if (lane >= step) until += lower;
  }
  after -= own_sum, until -= state_sum;
  float sum = after + own_sum + until + p.keep[run.slot * a.heads + head] * overlap;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t token = run.sample * a.n_k + run.begin + lane * kEach + i;
    if (lane * kEach + i < run.count) p.ddecay[token * a.heads + head] = sum;
    sum += states[i] - own[i];
  }
}

}  // namespace

cudaError_t launch_scan(const LinearScan& p, cudaStream_t stream) {
  const int each = ceil_div(p.states.s_size + p.states.z_size, kMaxThreads);
  const int64_t blocks = p.runs.sequences * p.states.heads * each;
  return blocks ? launch_blocks(linear_scan_kernel, blocks, kMaxThreads, 0, stream, p, each) : cudaSuccess;
}

cudaError_t launch_rest(const LinearRest& p, cudaStream_t stream) {
  if (!p.x.data || !p.cu_seqlens || !p.heads || !p.dim) return cudaSuccess;
  const int64_t blocks = std::min<int64_t>(1024, ceil_div(p.tokens * p.heads * p.dim, kMaxThreads));
  return blocks ? launch_blocks(linear_rest_kernel, blocks, kMaxThreads, 0, stream, p) : cudaSuccess;
}

cudaError_t launch_decay_grad(const LinearDecayGrad& p, cudaStream_t stream) {
  const size_t smem = smem_of<float>(kMaxThreads / 32);
  const int64_t blocks = p.runs.slots * p.a.heads;
  return blocks ? launch_blocks(linear_decay_grad_kernel, blocks, kMaxThreads, smem, stream, p) : cudaSuccess;
}

template <class T>
cudaError_t launch_sums(const LinearSums& p, cudaStream_t stream) {
  const size_t smem = 2 * smem_of<T>(kSide * kRow<T>) + smem_of<float>(4 * kSide) +
                      2 * smem_of<float>(kRunTiles * kSide) + smem_of<float>(kRunTiles);
  const int64_t blocks = p.runs.slots * p.a.heads * (p.k_slices * p.v_slices + p.z_slices);
  return blocks ? launch_blocks(linear_sums_kernel<T>, blocks, kMaxThreads, smem, stream, p) : cudaSuccess;
}

template cudaError_t launch_sums<bf16>(const LinearSums&, cudaStream_t);
template cudaError_t launch_sums<tf32>(const LinearSums&, cudaStream_t);
template cudaError_t launch_sums<float>(const LinearSums&, cudaStream_t);

}  // namespace vicinal::cuda
