// hash attention, backward (with r, e, T and dd as in csrc/cpu/hash_bwd.cpp):
//
//   reads     S dout_i, from which r_i and e_i; partial sums of dS, R = sum_i r_i and dz
//   codes     dv, and dd but for what sigma adds, with x . dx of both parts, kept per token
//   finish    dqk, once the sum of T d is there
#include "hash.cuh"

namespace vicinal::cuda {

namespace {

struct HashBackward {
  HashBwd w;
  HashCut cut;
  float *partials, *totals;  // [pairs, chunks, sums], [pairs, sums]: dS, R, dz
  float* slopes;             // [pairs, tiles]: sum of T d
  float *pulls, *inverses;   // dd [pairs, anchors, n]; 1 / |qk|, and x . dx of dd, of ones [pairs, 3, n]
};

// This thread's token: reads[i] = S_i . dout, the last one of the sum of v (or of v itself), into registers.
struct Reads {
  float of_code[kHashBits], of_value, inverse, e;

  __device__ Reads(const HashBackward& p, HashTile& tile, const HashBlock& b, const HashSums& state,
                   int64_t first)
      : of_code{}, of_value(0.0f) {
    const Hash& a = p.w.a;
    const bool there = first + threadIdx.x < b.last;
    const int32_t word = there ? p.w.codes[b.pair * a.n + first + threadIdx.x] : 0;
    tile.words[threadIdx.x] = word;
    for (int c0 = 0; c0 < a.dim_v; c0 += kHashSlice) {
      simt::sync_threads();
      read_slice(tile.channels, a, p.w.dout, a.dim_v, b.batch, b.head, first, b.last, c0);
      for (int i = threadIdx.x; i < (a.bits + 1) * kHashSlice; i += kMaxThreads) {
        const int channel = c0 + i % kHashSlice;
        tile.table[i] = channel < a.dim_v ? state.s[i / kHashSlice * a.dim_v + channel] : 0.0f;
      }
      simt::sync_threads();
      for (int c = 0; c < kHashSlice && c0 + c < a.dim_v; ++c) {
        const float x = tile.channels[threadIdx.x * kHashRow + c];
        float value = tile.table[a.bits * kHashSlice + c];
        if (a.self && there) {
          value = load_value(
              a.v.data, a.dtype,
              b.batch * a.v.stride_b + (first + threadIdx.x) * a.v.stride_n + b.head * a.v.stride_h + c0 + c);
        }
        of_value = fmaf(x, value, of_value);
#pragma unroll
        for (int i = 0; i < kHashBits; ++i) {
          if (i < a.bits) of_code[i] = fmaf(x, tile.table[i * kHashSlice + c], of_code[i]);
        }
      }
    }
    float sum = static_cast<float>(a.offset) * of_value;
#pragma unroll
    for (int i = 0; i < kHashBits; ++i) {
      if (i < a.bits) sum = fmaf(sign_of(word, i), of_code[i], sum);
    }
    inverse = there ? 1.0f / hash_den(a, state.z, word) : 0.0f;
    e = -sum * inverse * inverse;
  }
};

__device__ inline HashSums state_of(const HashBackward& p, const HashBlock& b) {
  const float* state = static_cast<const float*>(p.w.state) + b.pair * state_floats(p.w.a);
  return HashSums(p.w.a, const_cast<float*>(state));
}

__global__ void __launch_bounds__(kMaxThreads) hash_bwd_reads_kernel(HashBackward p) {
  const Hash& a = p.w.a;
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  HashTile tile(a, carver);
  const int count = (a.bits + 1) * a.dim_v + a.bits;
  float* sums = carver.take<float>(count);
  const HashBlock b(a, p.cut);
  const HashSums state = state_of(p, b);
  for (int i = threadIdx.x; i < count; i += kMaxThreads) sums[i] = 0.0f;
  for (int64_t first = b.first; first < b.last; first += kHashTile) {
    const Reads reads(p, tile, b, state, first);
    tile.factors[threadIdx.x] = reads.inverse;
    tile.weights[threadIdx.x] = reads.e;
    add_values(sums, tile, a, b, p.w.dout, first);
    add_codes(sums + (a.bits + 1) * a.dim_v, tile, a);
    simt::sync_threads();
  }
  float* to = p.partials + (b.pair * p.cut.chunks + b.chunk) * count;
  for (int i = threadIdx.x; i < count; i += kMaxThreads) to[i] = sums[i];
}

// dv of the tile's tokens: a lane a channel.
__device__ inline void store_values(const HashBackward& p, const HashTile& tile, const HashBlock& b,
                                    const HashSums& total) {
  const Hash& a = p.w.a;
  const float offset = static_cast<float>(a.offset);
  for (int c = threadIdx.x % 32; c < a.dim_v; c += 32) {
    float ds[kHashBits];
#pragma unroll
    for (int i = 0; i < kHashBits; ++i) ds[i] = i < a.bits ? total.s[i * a.dim_v + c] : 0.0f;
    const float constant = offset * total.v[c];
    for (int t = threadIdx.x / 32; t < kHashTile && b.first + t < b.last; t += kMaxThreads / 32) {
      const int64_t token = b.first + t;
      float sum = constant;
      if (a.self) {
        const Rows& x = p.w.dout;
        const int64_t at = b.batch * x.stride_b + token * x.stride_n + b.head * x.stride_h + c;
        sum = offset * tile.factors[t] * load_value(x.data, a.dtype, at);
      }
#pragma unroll
      for (int i = 0; i < kHashBits; ++i) sum = fmaf(sign_of(tile.words[t], i), ds[i], sum);
      const Strided dv{p.w.dv.data, p.w.dv.stride_b, p.w.dv.stride_n, p.w.dv.stride_h, 1};
      store_value(dv, a.dtype, offset_of(dv, b.batch, token, b.head) + c, sum);
    }
  }
}

// dcode of this thread's token, 0 where |y| >= 1.
__device__ inline void code_gradients(float (&g)[kHashBits], const HashBackward& p, HashTile& tile,
                                      const HashBlock& b, const Reads& reads, const HashSums& state,
                                      const HashSums& total) {
  const Hash& a = p.w.a;
#pragma unroll
  for (int i = 0; i < kHashBits; ++i) {
    g[i] = i < a.bits ? fmaf(reads.of_code[i], reads.inverse, reads.e * state.z[i]) + total.z[i] : 0.0f;
  }
  for (int c0 = 0; c0 < a.dim_v; c0 += kHashSlice) {
    simt::sync_threads();
    read_slice(tile.channels, a, a.v, a.dim_v, b.batch, b.head, b.first, b.last, c0);
    for (int i = threadIdx.x; i < a.bits * kHashSlice; i += kMaxThreads) {
      const int channel = c0 + i % kHashSlice;
      tile.table[i] = channel < a.dim_v ? total.s[i / kHashSlice * a.dim_v + channel] : 0.0f;
    }
    simt::sync_threads();
    for (int c = 0; c < kHashSlice; ++c) {
      const float x = tile.channels[threadIdx.x * kHashRow + c];
#pragma unroll
      for (int i = 0; i < kHashBits; ++i) {
        if (i < a.bits) g[i] = fmaf(x, tile.table[i * kHashSlice + c], g[i]);
      }
    }
  }
  const int32_t word = tile.words[threadIdx.x];
#pragma unroll
  for (int i = 0; i < kHashBits; ++i) {
    if (!(word >> (kHashBits + i) & 1)) g[i] = 0.0f;
  }
}

// The chunks of this pass are single tiles.
__global__ void __launch_bounds__(kMaxThreads) hash_bwd_codes_kernel(HashBackward p) {
  const Hash& a = p.w.a;
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  HashTile tile(a, carver);
  float* squares = carver.take<float>(a.anchors);
  float* of_warps = carver.take<float>(kMaxThreads / 32);
  const HashBlock b(a, p.cut);
  const HashSums state = state_of(p, b);
  const HashSums total(a, p.totals + b.pair * ((a.bits + 1) * a.dim_v + a.bits));
  const int64_t token = b.first + threadIdx.x;
  const bool there = token < b.last;
  const Reads reads(p, tile, b, state, b.first);
  tile.factors[threadIdx.x] = reads.inverse;
  for (int j = threadIdx.x; j < a.anchors; j += kMaxThreads) squares[j] = anchor_square(a, b.head, j);
  simt::sync_threads();
  store_values(p, tile, b, total);
  float g[kHashBits];
  code_gradients(g, p, tile, b, reads, state, total);

  tile.multiply_anchors(a, b, b.first);
  const float* weight = static_cast<const float*>(a.weight) + int64_t{b.head} * a.bits * a.anchors;
  const float factor = -0.5f / *state.sigma;
  float sum = 0.0f, pull = 0.0f, dots = 0.0f;
  for (int j = 0; j < a.anchors; ++j) {
    const float dot = tile.dots[j * kHashTile + threadIdx.x], d = 1.0f - 2.0f * dot + squares[j];
    float dy = 0.0f;
#pragma unroll
    for (int i = 0; i < kHashBits; ++i) {
      if (i < a.bits) dy = fmaf(g[i], weight[i * a.anchors + j], dy);
    }
    const float slope = dy * simt::ex2(d * factor * kLog2E);
    sum = fmaf(slope, d, sum);
    pull = fmaf(-2.0f * factor * slope, dot, pull);
    dots = fmaf(-2.0f, dot, dots);
    if (there) p.pulls[(b.pair * a.anchors + j) * a.n + token] = factor * slope;
  }
  if (there) {
    float* to = p.inverses + b.pair * 3 * a.n + token;
    to[0] = tile.inverse, to[a.n] = pull, to[2 * a.n] = dots;
  }
  sum = there ? sum : 0.0f;
  for (int lanes = 16; lanes; lanes /= 2) sum += simt::shfl_xor(sum, lanes);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  simt::sync_threads();
  if (threadIdx.x) return;
  sum = 0.0f;
  for (int i = 0; i < kMaxThreads / 32; ++i) sum += of_warps[i];
  p.slopes[b.pair * p.cut.chunks + b.chunk] = sum;
}

// dqk of a tile: a lane a channel.
__global__ void __launch_bounds__(kMaxThreads) hash_bwd_finish_kernel(HashBackward p) {
  const Hash& a = p.w.a;
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  float* pulls = carver.take<float>(a.anchors * kHashTile);
  float* inverses = carver.take<float>(kHashTile);
  float* projections = carver.take<float>(kHashTile);
  const HashBlock b(a, p.cut);
  const HashSums state = state_of(p, b);
  float all = 0.0f;
  for (int i = 0; i < p.cut.chunks; ++i) all += p.slopes[b.pair * p.cut.chunks + i];
  const float sigma = *state.sigma;
  all /= 2.0f * sigma * sigma * static_cast<float>(a.n) * static_cast<float>(a.anchors);
  const int64_t token = b.first + threadIdx.x;
  if (token < b.last) {
    const float* from = p.inverses + b.pair * 3 * a.n + token;
    inverses[threadIdx.x] = from[0];
    projections[threadIdx.x] = fmaf(all, from[2 * a.n], from[a.n]);
    for (int j = 0; j < a.anchors; ++j)
      pulls[j * kHashTile + threadIdx.x] = p.pulls[(b.pair * a.anchors + j) * a.n + token] + all;
  }
  simt::sync_threads();
  const float* anchors = static_cast<const float*>(a.anchor) + int64_t{b.head} * a.anchors * a.dim;
  const Rows& x = p.w.dqk;
  const Strided dqk{x.data, x.stride_b, x.stride_n, x.stride_h, 1};
  for (int c = threadIdx.x % 32; c < a.dim; c += 32) {
    for (int t = threadIdx.x / 32; t < kHashTile && b.first + t < b.last; t += kMaxThreads / 32) {
      float dx = 0.0f;
      for (int j = 0; j < a.anchors; ++j) dx = fmaf(pulls[j * kHashTile + t], anchors[j * a.dim + c], dx);
      const int64_t at = b.batch * a.qk.stride_b + (b.first + t) * a.qk.stride_n + b.head * a.qk.stride_h + c;
      const float unit = load_value(a.qk.data, a.dtype, at) * inverses[t];
      store_value(dqk, a.dtype, offset_of(dqk, b.batch, b.first + t, b.head) + c,
                  (-2.0f * dx - unit * projections[t]) * inverses[t]);
    }
  }
}

HashBackward backward_of(const HashBwd& p, float* memory, int64_t* floats) {
  const Hash& a = p.a;
  const int64_t pairs = a.batch * a.heads, sums = hash_sums_size(a);
  HashBackward w{p, hash_cut(a), nullptr, nullptr, nullptr, nullptr, nullptr};
  int64_t used = 0;
  const auto take = [&](float*& at, int64_t count) {
    at = memory ? memory + used : nullptr;
    used += count;
  };
  take(w.partials, pairs * w.cut.chunks * sums);
  take(w.totals, pairs * sums);
  take(w.slopes, pairs * ceil_div(a.n, kHashTile));
  take(w.pulls, pairs * a.anchors * a.n);
  take(w.inverses, pairs * 3 * a.n);
  *floats = used;
  return w;
}

}  // namespace

int64_t hash_bwd_workspace(const HashBwd& p) {
  int64_t floats = 0;
  backward_of(p, nullptr, &floats);
  return floats * static_cast<int64_t>(sizeof(float));
}

int hash_bwd(const HashBwd& p, void* workspace, void* stream_handle) {
  const Hash& a = p.a;
  const int64_t pairs = a.batch * a.heads;
  if (!pairs || !a.n) return cudaSuccess;
  cudaError_t error = refuse_hash(a);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  int64_t floats = 0;
  const HashBackward w = backward_of(p, static_cast<float*>(workspace), &floats);
  HashBackward by_tile = w;
  by_tile.cut = {1, ceil_div(a.n, kHashTile)};
  const auto run = [&](auto kernel, size_t smem, const HashBackward& params) {
    if (error != cudaSuccess) return;
    error = launch_blocks(kernel, pairs * params.cut.chunks, kMaxThreads, smem, stream, params);
  };
  const size_t of_sums = smem_of<float>(static_cast<int>(hash_sums_size(a)));
  run(hash_bwd_reads_kernel, hash_tile_bytes(a) + of_sums, w);
  if (error == cudaSuccess) {
    error = launch_hash_reduce(
        {w.partials, w.totals, pairs, hash_sums_size(a), hash_sums_size(a), w.cut.chunks}, stream);
  }
  run(hash_bwd_codes_kernel,
      hash_tile_bytes(a) + smem_of<float>(a.anchors) + smem_of<float>(kMaxThreads / 32), by_tile);
  run(hash_bwd_finish_kernel, smem_of<float>(a.anchors * kHashTile) + 2 * smem_of<float>(kHashTile), by_tile);
  return error;
}

}  // namespace vicinal::cuda
