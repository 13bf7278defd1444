// Tile verbs of the attention kernels: slots of a plan row, rows of a box into shared memory, products of
// tiles, row reductions, stores. A warp owns 16 rows of a block's tile. Its part of a 16 x 8 n accumulator
// has the layout of mma (simt.h): lane = 4 group + pair holds, of every 8 columns, rows group and group + 8,
// columns 2 pair and 2 pair + 1. float32 tiles use the same layout with fused multiply-adds in place of mma,
// so that the kernels are written once.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../attend.h"
#include "../pattern.h"
#include "simt.h"

namespace vicinal::cuda {

using simt::SmemCarver;
using bf16 = __nv_bfloat16;
using half = __half;

// float32 whose products may keep 11 bits of each factor: float16's precision on tensor cores, with the range
// of float32.
struct tf32 {
  float value;
};

constexpr int kMaxThreads = 128;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int32_t kNone = -1;   // slot without a token: excluded
constexpr int32_t kExtra = -2;  // slot of extra row e: kExtra - e

__device__ inline float minus_infinity() { return -INFINITY; }
__device__ inline int smaller(int a, int b) { return a < b ? a : b; }
__device__ inline int lane_group() { return threadIdx.x % 32 / 4; }
__device__ inline int lane_pair() { return threadIdx.x % 4; }
__device__ inline int warp_row() { return threadIdx.x / 32 * 16; }  // first row of the warp
__device__ inline int block_rows() { return blockDim.x / 2; }

// How a launch is cut, decided in launch.cuh.
struct Tiling {
  int32_t q_tiles, k_tiles;     // tiles of a row's queries, of its keys and extra rows
  int32_t k_total;              // most slots of keys of a row: box and extra rows
  int32_t parts, stages;        // blocks that share the columns of a tile; buffers of the inner loop
  int32_t d_pad, dv_pad;        // head dims rounded up to 16
  int32_t d_stride, dv_stride;  // elements between rows in shared memory
  int32_t q_align, k_align, v_align, out_align;  // bytes to which every row is aligned: 2, 4, 8 or 16
  bool store_pairs;                              // rows that are written are aligned to 4 bytes
};

// The window and query head that a block works on.
struct Window {
  int64_t batch;
  int32_t head, row;
};

// Query heads that share a head of k and v.
__device__ inline int head_group(const Attend& a) { return a.heads / a.kv_heads; }

struct QuerySlot {
  int32_t token, region, code, coord;  // token kNone: pad
  float scale, lse, delta;
};

struct KeySlot {
  int32_t token, region, code, coord;  // region -1: extra row, whose code is the whole bias index
  float scale, add;
};

__device__ inline int box_slots(const int32_t (&extent)[3]) { return extent[0] * extent[1] * extent[2]; }
__device__ inline int tiles_of(int slots, int tile) { return (slots + tile - 1) / tile; }

// Slots of the keys of a row: box and extra rows.
__device__ inline int key_count(const Attend& a, const PlanRow& row) {
  return box_slots(row.k_extent) + a.n_extra - a.edge_row;
}

template <class T>
__device__ T* row_of(const Rows& rows, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(rows.data) + batch * rows.stride_b + token * rows.stride_n + head * rows.stride_h;
}

__device__ inline QuerySlot query_slot(const Attend& a, const Window& w, int slot) {
  const PlanRow& row = a.plan.rows[w.row];
  QuerySlot q{kNone, 0, 0, 0, 1.0f, 0.0f, 0.0f};
  if (slot >= box_slots(row.q_extent)) return q;
  const AxisEntry entry = slot_entry(a.plan.axes, row.q_begin, row.q_extent, slot);
  if (entry.token < 0) return q;
  q.token = entry.token;
  q.region = entry.region;
  q.code = entry.code;
  q.coord = entry.coord;
  if (a.q_scale) {
    q.scale = static_cast<const float*>(a.q_scale)[(w.batch * a.n_q + q.token) * a.scale_stride_n + w.head];
  }
  return q;
}

__device__ inline KeySlot key_slot(const Attend& a, const Window& w, int slot) {
  const PlanRow& row = a.plan.rows[w.row];
  const int in_box = box_slots(row.k_extent), extra = slot - in_box;
  KeySlot k{kNone, -1, 0, 0, 1.0f, 0.0f};
  if (extra >= 0) {
    if (extra >= a.n_extra - a.edge_row) return k;
    k.token = kExtra - (a.edge_row + extra);
    k.code = static_cast<int32_t>(a.bias_size) - (a.n_extra - a.edge_row) + extra;
    return k;
  }
  const AxisEntry entry = slot_entry(a.plan.axes, row.k_begin, row.k_extent, slot);
  k.region = entry.region;
  k.code = entry.code;
  k.coord = entry.coord;
  if (entry.token < 0) {
    if (a.edge_row) k.token = kExtra;
    return k;
  }
  if (a.key_bias) k.add = static_cast<const float*>(a.key_bias)[w.batch * a.n_k + entry.token];
  if (k.add == minus_infinity()) return k;  // an ignored key may hold anything: its row is not even read
  k.token = entry.token;
  if (a.k_scale) {
    k.scale = static_cast<const float*>(a.k_scale)[(w.batch * a.n_k + k.token) * a.scale_stride_n + w.head];
  }
  return k;
}

// The token of a key slot, negative for pads and extra rows; of ignored keys too.
__device__ inline int32_t key_token(const Attend& a, const Window& w, int slot) {
  const PlanRow& row = a.plan.rows[w.row];
  if (slot >= box_slots(row.k_extent)) return kNone;
  return slot_entry(a.plan.axes, row.k_begin, row.k_extent, slot).token;
}

// 16 bytes of a row, zero from `valid` bytes on, from memory aligned to `align` bytes.
template <class T>
__device__ void load_chunk(T* to, const T* from, int valid, int align) {
  if (align >= 16) {
    simt::cp_async<16>(to, from, valid);
  } else if (align >= 4 || valid <= 0) {
    for (int i = 0; i < 16; i += 4) {
      const int left = valid - i < 0 ? 0 : valid - i;
      const int offset = left ? i / static_cast<int>(sizeof(T)) : 0;
      simt::cp_async<4>(to + i / static_cast<int>(sizeof(T)), from + offset, left < 4 ? left : 4);
    }
  } else {
    for (int i = 0; i < 16 / static_cast<int>(sizeof(T)); ++i) {
      to[i] = i * static_cast<int>(sizeof(T)) < valid ? from[i] : T(0.0f);
    }
  }
}

// Rows [count, pad] of slots into shared memory, zeros where a slot has no token; rows beyond `count` up to
// the next 16 too. `head` is one of the tensor's own.
template <class T, class Slot>
__device__ void load_rows(T* tile, int stride, const Slot* slots, int count, const Rows& rows,
                          const Rows& extra, int64_t batch, int head, int dim, int pad, int align) {
  constexpr int kChunk = 16 / sizeof(T);
  const int chunks = pad / kChunk;
  for (int i = threadIdx.x; i < (count + 15) / 16 * 16 * chunks; i += blockDim.x) {
    const int row = i / chunks, col = i % chunks * kChunk;
    const int32_t token = row < count ? slots[row].token : kNone;
    const T* from = static_cast<const T*>(rows.data);
    int valid = 0;
    if (token != kNone && col < dim) {
      from = token >= 0 ? row_of<T>(rows, batch, token, head) : row_of<T>(extra, batch, kExtra - token, head);
      from += col;
      valid = (dim - col < kChunk ? dim - col : kChunk) * static_cast<int>(sizeof(T));
    }
    load_chunk(tile + row * stride + col, from, valid, align);
  }
}

// Runs compute(tile, stage) for every tile of an inner loop whose slots and rows come through `stages`
// buffers. What the caller copied before is complete in the first compute, and in the end.
template <class LoadSlots, class LoadRows, class Compute>
__device__ __forceinline__ void for_each_tile(int tiles, int stages, LoadSlots load_slots, LoadRows load_rows,
                                              Compute compute) {
  auto fetch = [&](int tile) {
    const int stage = stages == 2 ? tile % 2 : 0;
    load_slots(tile, stage);
    simt::sync_threads();
    load_rows(tile, stage);
  };
  if (tiles > 0) fetch(0);
  simt::cp_async_commit();
  if (tiles <= 0) {
    simt::cp_async_wait<0>();
    simt::sync_threads();
  }
  for (int tile = 0; tile < tiles; ++tile) {
    if (stages == 2) {
      if (tile + 1 < tiles) fetch(tile + 1);
      simt::cp_async_commit();
      simt::cp_async_wait<1>();
    } else {
      simt::cp_async_wait<0>();
    }
    simt::sync_threads();
    compute(tile, stages == 2 ? tile % 2 : 0);
    simt::sync_threads();
    if (stages == 1 && tile + 1 < tiles) {
      fetch(tile + 1);
      simt::cp_async_commit();
    }
  }
}

template <class T>
__device__ T rounded(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  if constexpr (std::is_same_v<T, half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, tf32>) {  // the hardware would drop the bits instead
    uint32_t bits = 0;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x1000u) & 0xffffe000u;
    tf32 y{};
    memcpy(&y.value, &bits, sizeof bits);
    return y;
  }
}

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(tf32 x) { return x.value; }
__device__ __forceinline__ float widened(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(half x) { return __half2float(x); }

__device__ __forceinline__ uint32_t bits_of(tf32 x) {
  uint32_t bits = 0;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Two values rounded to a 16-bit type, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits = 0;
  if constexpr (std::is_same_v<T, half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

__device__ inline float dot(float4 a, float4 b, float sum) {
  return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
}

// c [16, 8 N] += a [16, depth] b [8 N, depth]^T, both in shared memory; columns from `count` on are left out
// (by 16).
template <class T, int N>
__device__ __forceinline__ void product_nt(float (&c)[N][4], const T* a, int a_stride, const T* b,
                                           int b_stride, int depth, int count) {
  const int lane = threadIdx.x % 32, group = lane_group(), pair = lane_pair();
  if constexpr (sizeof(T) == 2) {
    a += lane % 16 * a_stride + lane / 16 * 8;
    b += (lane % 8 + lane / 16 * 8) * b_stride + lane / 8 % 2 * 8;
    for (int k = 0; k < depth; k += 16) {
      uint32_t left[4];
      simt::ldmatrix_x4(left, a + k);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        if (8 * n >= count) continue;
        uint32_t right[4];
        simt::ldmatrix_x4(right, b + 8 * n * b_stride + k);
        simt::mma_m16n8k16<T>(c[n], left, right[0], right[1]);
        simt::mma_m16n8k16<T>(c[n + 1], left, right[2], right[3]);
      }
    }
  } else if constexpr (std::is_same_v<T, tf32>) {
    a += group * a_stride + pair;
    b += group * b_stride + pair;
    for (int k = 0; k < depth; k += 8) {
      const uint32_t left[4] = {bits_of(a[k]), bits_of(a[8 * a_stride + k]), bits_of(a[k + 4]),
                                bits_of(a[8 * a_stride + k + 4])};
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (8 * n >= count) continue;
        const T* right = b + 8 * n * b_stride + k;
        simt::mma_m16n8k8_tf32(c[n], left, bits_of(right[0]), bits_of(right[4]));
      }
    }
  } else {
    a += group * a_stride;
    b += 2 * pair * b_stride;
    for (int k = 0; k < depth; k += 4) {
      const float4 a0 = *reinterpret_cast<const float4*>(a + k);
      const float4 a1 = *reinterpret_cast<const float4*>(a + 8 * a_stride + k);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (8 * n >= count) continue;
        const float4 b0 = *reinterpret_cast<const float4*>(b + 8 * n * b_stride + k);
        const float4 b1 = *reinterpret_cast<const float4*>(b + (8 * n + 1) * b_stride + k);
        c[n][0] = dot(a0, b0, c[n][0]);
        c[n][1] = dot(a0, b1, c[n][1]);
        c[n][2] = dot(a1, b0, c[n][2]);
        c[n][3] = dot(a1, b1, c[n][3]);
      }
    }
  }
}

// c [16, 8 M] += a [16, 8 N] b [8 N, 8 M]: a in registers (rounded to T), b in shared memory. Rows of b from
// `count` on and columns from `cols` on are left out (by 16).
template <class T, int N, int M>
__device__ __forceinline__ void product_pn(float (&c)[M][4], const float (&a)[N][4], const T* b, int b_stride,
                                           int count, int cols) {
  const int lane = threadIdx.x % 32, group = lane_group(), pair = lane_pair();
  if constexpr (sizeof(T) == 2) {
    b += lane % 16 * b_stride + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      if (8 * n >= count) continue;
      const uint32_t left[4] = {pack<T>(a[n][0], a[n][1]), pack<T>(a[n][2], a[n][3]),
                                pack<T>(a[n + 1][0], a[n + 1][1]), pack<T>(a[n + 1][2], a[n + 1][3])};
#pragma unroll
      for (int m = 0; m < M; m += 2) {
        if (8 * m >= cols) continue;
        uint32_t right[4];
        simt::ldmatrix_x4_trans(right, b + 8 * n * b_stride + 8 * m);
        simt::mma_m16n8k16<T>(c[m], left, right[0], right[1]);
        simt::mma_m16n8k16<T>(c[m + 1], left, right[2], right[3]);
      }
    }
  } else if constexpr (std::is_same_v<T, tf32>) {
    b += 2 * pair * b_stride + group;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (8 * n >= count) continue;
      // Any order of the inner index will do, if it is the same on both sides: 0 2 4 6 1 3 5 7.
      const uint32_t left[4] = {bits_of(rounded<T>(a[n][0])), bits_of(rounded<T>(a[n][2])),
                                bits_of(rounded<T>(a[n][1])), bits_of(rounded<T>(a[n][3]))};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (8 * m >= cols) continue;
        const T* right = b + 8 * n * b_stride + 8 * m;
        simt::mma_m16n8k8_tf32(c[m], left, bits_of(right[0]), bits_of(right[b_stride]));
      }
    }
  } else {
    b += 2 * pair;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (8 * n >= count) continue;
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {  // lane e of a row's four holds columns 2 e and 2 e + 1 of a
        const float a0 = simt::shfl(a[n][0], 4 * group + e), a1 = simt::shfl(a[n][1], 4 * group + e);
        const float a2 = simt::shfl(a[n][2], 4 * group + e), a3 = simt::shfl(a[n][3], 4 * group + e);
        const float* row = b + (8 * n + 2 * e) * b_stride;
#pragma unroll
        for (int m = 0; m < M; ++m) {
          if (8 * m >= cols) continue;
          const float2 b0 = *reinterpret_cast<const float2*>(row + 8 * m);
          const float2 b1 = *reinterpret_cast<const float2*>(row + b_stride + 8 * m);
          c[m][0] = fmaf(a0, b0.x, fmaf(a1, b1.x, c[m][0]));
          c[m][1] = fmaf(a0, b0.y, fmaf(a1, b1.y, c[m][1]));
          c[m][2] = fmaf(a2, b0.x, fmaf(a3, b1.x, c[m][2]));
          c[m][3] = fmaf(a2, b0.y, fmaf(a3, b1.y, c[m][3]));
        }
      }
    }
  }
}

// c [16, 8 N] += x y^T for the lane's two elements of a column x and a row y of N eights.
template <int N>
__device__ __forceinline__ void add_outer(float (&c)[N][4], float upper, float lower, const float* row,
                                          int cols) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if (8 * n >= cols) continue;
    const float2 y = *reinterpret_cast<const float2*>(row + 8 * n);
    c[n][0] = fmaf(upper, y.x, c[n][0]);
    c[n][1] = fmaf(upper, y.y, c[n][1]);
    c[n][2] = fmaf(lower, y.x, c[n][2]);
    c[n][3] = fmaf(lower, y.y, c[n][3]);
  }
}

// c [16, 8 N] += a b, both in shared memory: b [depth, 8 N], and a [16, depth], or the transpose of
// a [depth, 16]. Columns from `cols` on are left out (by 16).
template <bool kTransposed, class T, int N>
__device__ __forceinline__ void product_nn(float (&c)[N][4], const T* a, int a_stride, const T* b,
                                           int b_stride, int depth, int cols) {
  const int lane = threadIdx.x % 32, group = lane_group(), pair = lane_pair();
  const int by_row = kTransposed ? 1 : a_stride, by_depth = kTransposed ? a_stride : 1;
  if constexpr (sizeof(T) == 2) {
    a += kTransposed ? (lane % 8 + lane / 16 * 8) * a_stride + lane / 8 % 2 * 8
                     : lane % 16 * a_stride + lane / 16 * 8;
    b += lane % 16 * b_stride + lane / 16 * 8;
    for (int k = 0; k < depth; k += 16) {
      uint32_t left[4];
      if constexpr (kTransposed) {
        simt::ldmatrix_x4_trans(left, a + k * by_depth);
      } else {
        simt::ldmatrix_x4(left, a + k);
      }
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        if (8 * n >= cols) continue;
        uint32_t right[4];
        simt::ldmatrix_x4_trans(right, b + k * b_stride + 8 * n);
        simt::mma_m16n8k16<T>(c[n], left, right[0], right[1]);
        simt::mma_m16n8k16<T>(c[n + 1], left, right[2], right[3]);
      }
    }
  } else if constexpr (std::is_same_v<T, tf32>) {
    a += group * by_row + pair * by_depth;
    b += pair * b_stride + group;
    for (int k = 0; k < depth; k += 8) {
      const T* at = a + k * by_depth;
      const uint32_t left[4] = {bits_of(at[0]), bits_of(at[8 * by_row]), bits_of(at[4 * by_depth]),
                                bits_of(at[8 * by_row + 4 * by_depth])};
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (8 * n >= cols) continue;
        const T* right = b + k * b_stride + 8 * n;
        simt::mma_m16n8k8_tf32(c[n], left, bits_of(right[0]), bits_of(right[4 * b_stride]));
      }
    }
  } else {
    a += group * by_row;
    for (int k = 0; k < depth; ++k) {
      const T* at = a + k * by_depth;
      add_outer(c, at[0], at[8 * by_row], b + k * b_stride + 2 * pair, cols);
    }
  }
}

// Over the four lanes that share a row.
__device__ inline float row_max(float x) {
  x = fmaxf(x, simt::shfl_xor(x, 1));
  return fmaxf(x, simt::shfl_xor(x, 2));
}
__device__ inline float row_sum(float x) {
  x += simt::shfl_xor(x, 1);
  return x + simt::shfl_xor(x, 2);
}

// One row of an accumulator (upper: row `group`, lower: row `group + 8`), columns first .. first + 8 M of a
// row of `dim`.
template <class T, int M>
__device__ __forceinline__ void store_row(T* row, const float (&c)[M][4], bool lower, float factor, int first,
                                          int dim, bool pairs) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int col = first + 8 * m + 2 * lane_pair();
    const float x = factor * c[m][lower ? 2 : 0], y = factor * c[m][lower ? 3 : 1];
    if (sizeof(T) == 2 && pairs && col + 1 < dim) {
      *reinterpret_cast<uint32_t*>(row + col) = pack<T>(x, y);
    } else {
      if (col < dim) row[col] = rounded<T>(x);
      if (col + 1 < dim) row[col + 1] = rounded<T>(y);
    }
  }
}

}  // namespace vicinal::cuda
