// What the passes of hash attention share (csrc/hash.h has the formula).
//
// Codes have at most 16 bits, so no product is large enough for tensor cores: the passes are bound by what
// they read. A block takes 128 tokens of one head, a thread a token where codes are made and a channel where
// values are summed up; channels go through shared memory 32 at a time, so that any width will do.
#pragma once

#include "../hash.h"
#include "linear.cuh"

namespace vicinal::cuda {

constexpr int kHashTile = kMaxThreads;  // tokens
constexpr int kHashSlice = 32;          // channels
constexpr int kHashRow = kHashSlice + 1;

// How the tokens of a head are cut: chunks of whole tiles, at most 32, whose sums are added up in order.
struct HashCut {
  int32_t tiles, chunks;  // tiles of a chunk; chunks of a head
};

// The block's chunk of a head.
struct HashBlock {
  int64_t batch, pair, first, last;  // tokens
  int32_t head, chunk;

  __device__ HashBlock(const Hash& a, const HashCut& cut) {
    uint32_t block = blockIdx.x;
    chunk = take_index(block, cut.chunks);
    pair = block;
    head = take_index(block, a.heads);
    batch = block;
    first = int64_t{chunk} * cut.tiles * kHashTile;
    last = first + int64_t{cut.tiles} * kHashTile;
    if (last > a.n) last = a.n;
  }
};

// Sums S [bits][dim_v], of v [dim_v], z [bits], and sigma of a head.
struct HashSums {
  float *s, *v, *z, *sigma;
  __device__ HashSums(const Hash& a, float* at)
      : s(at), v(at + a.bits * a.dim_v), z(v + a.dim_v), sigma(z + a.bits) {}
};

// Hash::state_size, on the device too.
__device__ inline int64_t state_floats(const Hash& a) { return int64_t{a.bits + 1} * a.dim_v + a.bits + 1; }

__device__ inline float sign_of(int32_t word, int bit) { return word >> bit & 1 ? 1.0f : -1.0f; }

// Channels first_channel .. of the tokens first .. as tile [kHashTile][kHashRow], 0 beyond either end.
__device__ inline void read_slice(float* tile, const Hash& a, const Rows& x, int32_t dim, int64_t batch,
                                  int head, int64_t first, int64_t last, int first_channel) {
  for (int i = threadIdx.x; i < kHashTile * kHashSlice; i += kMaxThreads) {
    const int row = i / kHashSlice, channel = first_channel + i % kHashSlice;
    const bool there = first + row < last && channel < dim;
    const int64_t at = batch * x.stride_b + (first + row) * x.stride_n + head * x.stride_h + channel;
    tile[row * kHashRow + i % kHashSlice] = there ? load_value(x.data, a.dtype, at) : 0.0f;
  }
}

// Shared memory of a tile: channels, scalar products with anchors, tables.
struct HashTile {
  float *channels, *dots, *table, *factors, *weights;
  int32_t* words;
  float inverse;  // 1 / |qk| of this thread's token, 0 for a zero vector

  __device__ HashTile(const Hash& a, SmemCarver& carver)
      : channels(carver.take<float>(kHashTile * kHashRow)),
        dots(carver.take<float>(a.anchors * kHashTile)),
        table(carver.take<float>((a.anchors > kHashBits ? a.anchors : kHashBits + 1) * kHashSlice)),
        factors(carver.take<float>(kHashTile)),
        weights(carver.take<float>(kHashTile)),
        words(carver.take<int32_t>(kHashTile)) {}

  // dots[j][t] = x_t . anchor_j, and `inverse`.
  __device__ void multiply_anchors(const Hash& a, const HashBlock& b, int64_t first) {
    const float* anchors = static_cast<const float*>(a.anchor) + int64_t{b.head} * a.anchors * a.dim;
    float square = 0.0f;
    for (int j = 0; j < a.anchors; ++j) dots[j * kHashTile + threadIdx.x] = 0.0f;
    for (int c0 = 0; c0 < a.dim; c0 += kHashSlice) {
      simt::sync_threads();
      read_slice(channels, a, a.qk, a.dim, b.batch, b.head, first, b.last, c0);
      for (int i = threadIdx.x; i < a.anchors * kHashSlice; i += kMaxThreads) {
        const int channel = c0 + i % kHashSlice;
        table[i] = channel < a.dim ? anchors[i / kHashSlice * a.dim + channel] : 0.0f;
      }
      simt::sync_threads();
      const float* x = channels + threadIdx.x * kHashRow;
      for (int c = 0; c < kHashSlice; ++c) square = fmaf(x[c], x[c], square);
      for (int j = 0; j < a.anchors; ++j) {
        float dot = 0.0f;
        for (int c = 0; c < kHashSlice; ++c) dot = fmaf(x[c], table[j * kHashSlice + c], dot);
        dots[j * kHashTile + threadIdx.x] += dot;
      }
    }
    inverse = square > 0.0f ? 1.0f / sqrtf(square) : 0.0f;
    for (int j = 0; j < a.anchors; ++j) dots[j * kHashTile + threadIdx.x] *= inverse;
  }
};

// |anchor_j|^2
__device__ inline float anchor_square(const Hash& a, int head, int j) {
  const float* anchor = static_cast<const float*>(a.anchor) + (int64_t{head} * a.anchors + j) * a.dim;
  float sum = 0.0f;
  for (int c = 0; c < a.dim; ++c) sum = fmaf(anchor[c], anchor[c], sum);
  return sum;
}

// Adds to sums [bits + 1][dim_v]: those of factor_t code_t value_t^T, and of factor_t value_t. Every element
// has one thread.
__device__ inline void add_values(float* sums, HashTile& tile, const Hash& a, const HashBlock& b,
                                  const Rows& values, int64_t first) {
  for (int c0 = 0; c0 < a.dim_v; c0 += kHashSlice) {
    simt::sync_threads();
    read_slice(tile.channels, a, values, a.dim_v, b.batch, b.head, first, b.last, c0);
    simt::sync_threads();
    for (int i = threadIdx.x; i < (a.bits + 1) * kHashSlice; i += kMaxThreads) {
      const int bit = i / kHashSlice, c = i % kHashSlice;
      if (c0 + c >= a.dim_v) continue;
      float sum = 0.0f;
      for (int t = 0; t < kHashTile; ++t) {
        const float x = tile.factors[t] * tile.channels[t * kHashRow + c];
        sum += bit < a.bits ? sign_of(tile.words[t], bit) * x : x;
      }
      sums[bit * a.dim_v + c0 + c] += sum;
    }
  }
}

// z [bits] += weight_t code_t.
__device__ inline void add_codes(float* z, const HashTile& tile, const Hash& a) {
  if (static_cast<int>(threadIdx.x) >= a.bits) return;
  float sum = 0.0f;
  for (int t = 0; t < kHashTile; ++t) sum = fmaf(tile.weights[t], sign_of(tile.words[t], threadIdx.x), sum);
  z[threadIdx.x] += sum;
}

// code . z + n offset of a word.
__device__ inline float hash_den(const Hash& a, const float* z, int32_t word) {
  float den = static_cast<float>(a.offset) * static_cast<float>(a.n);
  for (int i = 0; i < a.bits; ++i) den = fmaf(sign_of(word, i), z[i], den);
  return den;
}

// to[i] = sum of the chunks' partial results [chunks][size], in order.
struct HashReduce {
  const float* from;
  float* to;
  int64_t pairs, size, to_stride;
  int32_t chunks;
};
cudaError_t launch_hash_reduce(const HashReduce& p, cudaStream_t stream);

inline HashCut hash_cut(const Hash& a) {
  const int tiles = ceil_div(a.n, kHashTile), each = std::max(1, ceil_div(tiles, 32));
  return {each, ceil_div(tiles, each)};
}
inline int64_t hash_sums_size(const Hash& a) { return int64_t{a.bits + 1} * a.dim_v + a.bits; }
inline size_t hash_tile_bytes(const Hash& a) {
  return smem_of<float>(kHashTile * kHashRow) + smem_of<float>(a.anchors * kHashTile) +
         smem_of<float>(std::max(a.anchors, kHashBits + 1) * kHashSlice) + 3 * smem_of<float>(kHashTile);
}
inline cudaError_t refuse_hash(const Hash& a) {
  return a.dtype == kF64 || a.bits > kHashBits || a.bits < 1 ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace vicinal::cuda
