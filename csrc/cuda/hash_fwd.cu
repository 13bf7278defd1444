// hash attention, forward: sums of unit vectors, from which sigma; codes and their sums; results. Partial
// sums of chunks are added up in order.
//
// sigma needs no distances: the mean of d is 1 + mean |anchor|^2 - 2 (mean x) . (mean anchor).
#include "hash.cuh"

namespace vicinal::cuda {

namespace {

struct HashForward {
  HashFwd w;
  HashCut cut;
  float *units, *partials;  // [pairs, chunks, dim], [pairs, chunks, sums]
};

// Sum of the unit vectors of a chunk: a warp a token, a lane every 32nd channel.
__global__ void __launch_bounds__(kMaxThreads) hash_units_kernel(HashForward p) {
  constexpr int kWarps = kMaxThreads / 32;
  const Hash& a = p.w.a;
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  float* sums = carver.take<float>(kWarps * a.dim);
  const HashBlock b(a, p.cut);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int c = lane; c < a.dim; c += 32) sums[warp * a.dim + c] = 0.0f;
  for (int64_t token = b.first + warp; token < b.last; token += kWarps) {
    const int64_t at = b.batch * a.qk.stride_b + token * a.qk.stride_n + b.head * a.qk.stride_h;
    float square = 0.0f;
    for (int c = lane; c < a.dim; c += 32) {
      const float x = load_value(a.qk.data, a.dtype, at + c);
      square = fmaf(x, x, square);
    }
    for (int lanes = 16; lanes; lanes /= 2) square += simt::shfl_xor(square, lanes);
    const float inverse = square > 0.0f ? 1.0f / sqrtf(square) : 0.0f;
    for (int c = lane; c < a.dim; c += 32)
      sums[warp * a.dim + c] += load_value(a.qk.data, a.dtype, at + c) * inverse;
  }
  simt::sync_threads();
  for (int c = threadIdx.x; c < a.dim; c += kMaxThreads) {
    float sum = 0.0f;
    for (int i = 0; i < kWarps; ++i) sum += sums[i * a.dim + c];
    p.units[(b.pair * p.cut.chunks + b.chunk) * a.dim + c] = sum;
  }
}

// A warp: sigma of a head.
__global__ void __launch_bounds__(kMaxThreads) hash_sigma_kernel(HashForward p) {
  const Hash& a = p.w.a;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * (kMaxThreads / 32) + threadIdx.x / 32;
  if (pair >= a.batch * a.heads) return;
  const int lane = threadIdx.x % 32, head = static_cast<int>(pair % a.heads);
  const float* anchors = static_cast<const float*>(a.anchor) + int64_t{head} * a.anchors * a.dim;
  float sum = 0.0f;
  for (int c = lane; c < a.dim; c += 32) {
    float of_x = 0.0f, of_anchors = 0.0f, squares = 0.0f;
    for (int chunk = 0; chunk < p.cut.chunks; ++chunk)
      of_x += p.units[(pair * p.cut.chunks + chunk) * a.dim + c];
    for (int j = 0; j < a.anchors; ++j) {
      const float x = anchors[j * a.dim + c];
      of_anchors += x;
      squares = fmaf(x, x, squares);
    }
    sum += squares - 2.0f * of_anchors * of_x / static_cast<float>(a.n);
  }
  for (int lanes = 16; lanes; lanes /= 2) sum += simt::shfl_xor(sum, lanes);
  if (lane == 0) {
    const HashSums to(a, static_cast<float*>(p.w.state) + pair * state_floats(a));
    *to.sigma = 1.0f + sum / static_cast<float>(a.anchors);
  }
}

// Codes of a chunk, and their sums.
__global__ void __launch_bounds__(kMaxThreads) hash_codes_kernel(HashForward p) {
  const Hash& a = p.w.a;
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  HashTile tile(a, carver);
  float* squares = carver.take<float>(a.anchors);
  float* sums = carver.take<float>(static_cast<int>((a.bits + 1) * a.dim_v + a.bits));
  const HashBlock b(a, p.cut);
  const HashSums state(a, static_cast<float*>(p.w.state) + b.pair * state_floats(a));
  const float* weight = static_cast<const float*>(a.weight) + int64_t{b.head} * a.bits * a.anchors;
  const float* mean = static_cast<const float*>(a.mean) + int64_t{b.head} * a.anchors;
  const float factor = -0.5f / *state.sigma;
  const int count = (a.bits + 1) * a.dim_v + a.bits;
  for (int i = threadIdx.x; i < count; i += kMaxThreads) sums[i] = 0.0f;
  for (int j = threadIdx.x; j < a.anchors; j += kMaxThreads) squares[j] = anchor_square(a, b.head, j);
  for (int64_t first = b.first; first < b.last; first += kHashTile) {
    tile.multiply_anchors(a, b, first);
    float y[kHashBits] = {};
    for (int j = 0; j < a.anchors; ++j) {
      const float d = 1.0f - 2.0f * tile.dots[j * kHashTile + threadIdx.x] + squares[j];
      const float kernel = simt::ex2(d * factor * kLog2E) - mean[j];
#pragma unroll
      for (int i = 0; i < kHashBits; ++i) {
        if (i < a.bits) y[i] = fmaf(kernel, weight[i * a.anchors + j], y[i]);
      }
    }
    int32_t word = 0;
#pragma unroll
    for (int i = 0; i < kHashBits; ++i) {
      if (i >= a.bits) continue;
      word |= static_cast<int32_t>(y[i] >= 0.0f) << i;
      word |= static_cast<int32_t>(static_cast<uint32_t>(fabsf(y[i]) < 1.0f) << (kHashBits + i));
    }
    const bool there = first + threadIdx.x < b.last;
    if (there) p.w.codes[b.pair * a.n + first + threadIdx.x] = word;
    tile.words[threadIdx.x] = word;
    tile.factors[threadIdx.x] = tile.weights[threadIdx.x] = there ? 1.0f : 0.0f;
    add_values(sums, tile, a, b, a.v, first);
    add_codes(sums + (a.bits + 1) * a.dim_v, tile, a);
    simt::sync_threads();
  }
  float* to = p.partials + (b.pair * p.cut.chunks + b.chunk) * count;
  for (int i = threadIdx.x; i < count; i += kMaxThreads) to[i] = sums[i];
}

// Results of a tile: a lane a channel.
__global__ void __launch_bounds__(kMaxThreads) hash_results_kernel(HashForward p) {
  const Hash& a = p.w.a;
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  float* factors = carver.take<float>(kHashTile);
  int32_t* words = carver.take<int32_t>(kHashTile);
  const HashBlock b(a, p.cut);
  const HashSums state(a, static_cast<float*>(p.w.state) + b.pair * state_floats(a));
  const float offset = static_cast<float>(a.offset);
  if (b.first + threadIdx.x < b.last) {
    words[threadIdx.x] = p.w.codes[b.pair * a.n + b.first + threadIdx.x];
    factors[threadIdx.x] = 1.0f / hash_den(a, state.z, words[threadIdx.x]);
  }
  simt::sync_threads();
  const int lane = threadIdx.x % 32;
  for (int c = lane; c < a.dim_v; c += 32) {
    float s[kHashBits];
#pragma unroll
    for (int i = 0; i < kHashBits; ++i) s[i] = i < a.bits ? state.s[i * a.dim_v + c] : 0.0f;
    const float constant = offset * state.v[c];
    for (int t = threadIdx.x / 32; t < kHashTile && b.first + t < b.last; t += kMaxThreads / 32) {
      const int64_t token = b.first + t;
      float sum = constant;
      if (a.self) {
        const int64_t at = b.batch * a.v.stride_b + token * a.v.stride_n + b.head * a.v.stride_h + c;
        sum = offset * load_value(a.v.data, a.dtype, at);
      }
#pragma unroll
      for (int i = 0; i < kHashBits; ++i) sum = fmaf(sign_of(words[t], i), s[i], sum);
      const Rows& x = p.w.out;
      const Strided out{x.data, x.stride_b, x.stride_n, x.stride_h, 1};
      store_value(out, a.dtype, offset_of(out, b.batch, token, b.head) + c, sum * factors[t]);
    }
  }
}

__global__ void __launch_bounds__(kMaxThreads) hash_reduce_kernel(HashReduce p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x;
  if (i >= p.pairs * p.size) return;
  const int64_t pair = i / p.size, at = i % p.size;
  float sum = 0.0f;
  for (int chunk = 0; chunk < p.chunks; ++chunk) sum += p.from[(pair * p.chunks + chunk) * p.size + at];
  p.to[pair * p.to_stride + at] = sum;
}

}  // namespace

cudaError_t launch_hash_reduce(const HashReduce& p, cudaStream_t stream) {
  return launch_blocks(hash_reduce_kernel, ceil_div(p.pairs * p.size, kMaxThreads), kMaxThreads, 0, stream,
                       p);
}

int64_t hash_fwd_workspace(const HashFwd& p) {
  const int64_t chunks = p.a.batch * p.a.heads * hash_cut(p.a).chunks;
  return chunks * (p.a.dim + hash_sums_size(p.a)) * static_cast<int64_t>(sizeof(float));
}

int hash_fwd(const HashFwd& p, void* workspace, void* stream_handle) {
  const Hash& a = p.a;
  const int64_t pairs = a.batch * a.heads;
  if (!pairs || !a.n) return cudaSuccess;
  cudaError_t error = refuse_hash(a);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const HashCut cut = hash_cut(a);
  float* memory = static_cast<float*>(workspace);
  const HashForward w{p, cut, memory, memory + pairs * cut.chunks * a.dim};
  HashForward by_tile = w;
  by_tile.cut = {1, ceil_div(a.n, kHashTile)};
  const size_t of_units = smem_of<float>(kMaxThreads / 32 * a.dim);
  const size_t of_codes =
      hash_tile_bytes(a) + smem_of<float>(a.anchors) + smem_of<float>(static_cast<int>(hash_sums_size(a)));
  const auto run = [&](auto kernel, int64_t blocks, size_t smem, const HashForward& params) {
    if (error == cudaSuccess) error = launch_blocks(kernel, blocks, kMaxThreads, smem, stream, params);
  };
  run(hash_units_kernel, pairs * cut.chunks, of_units, w);
  run(hash_sigma_kernel, ceil_div(pairs, kMaxThreads / 32), 0, w);
  run(hash_codes_kernel, pairs * cut.chunks, of_codes, w);
  if (error == cudaSuccess) {
    error = launch_hash_reduce(
        {w.partials, static_cast<float*>(p.state), pairs, hash_sums_size(a), a.state_size(), cut.chunks},
        stream);
  }
  run(hash_results_kernel, pairs * by_tile.cut.chunks,
      smem_of<float>(kHashTile) + smem_of<int32_t>(kHashTile), by_tile);
  return error;
}

}  // namespace vicinal::cuda
