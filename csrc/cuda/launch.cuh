// Host side of the attention launches: alignments, how a window is cut into tiles, which instance of a kernel
// runs.
#pragma once

#include <algorithm>

#include "attend.cuh"

namespace vicinal::cuda {

constexpr int kMaxHeadDim = 256, kMaxCols = 128;

// The last index of a mixed-radix number, which it loses.
__device__ inline int take_index(uint32_t& rest, int extent) {
  const int index = static_cast<int>(rest % extent);
  rest /= extent;
  return index;
}

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
inline int round_up(int a, int b) { return (a + b - 1) / b * b; }

template <class T>
size_t smem_of(int count) {
  return (count * sizeof(T) + 15) / 16 * 16;
}

// Bytes (2 to 16) to which every row of a tensor is aligned.
inline int alignment(const Rows& rows, int64_t bytes) {
  const uint64_t bits = reinterpret_cast<uint64_t>(rows.data) | static_cast<uint64_t>(rows.stride_b * bytes) |
                        static_cast<uint64_t>(rows.stride_n * bytes) |
                        static_cast<uint64_t>(rows.stride_h * bytes);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

inline int alignment(const Rows& rows, const Rows& extra, int64_t bytes) {
  return extra.data ? std::min(alignment(rows, bytes), alignment(extra, bytes)) : alignment(rows, bytes);
}

template <class T>
Tiling tiling_of(const Attend& a, int cols) {
  constexpr int kPadding =
      16 / sizeof(T);  // shifts each row by four banks: neither ldmatrix nor float4 reads collide
  Tiling t{};
  t.k_total = a.plan.k_slots + a.n_extra - a.edge_row;
  t.d_pad = round_up(a.head_dim, 16);
  t.dv_pad = round_up(a.head_dim_v, 16);
  t.d_stride = t.d_pad + kPadding;
  t.dv_stride = t.dv_pad + kPadding;
  t.parts = ceil_div(t.dv_pad, cols);
  t.q_align = alignment(a.q, sizeof(T));
  t.k_align = alignment(a.k, a.extra_k, sizeof(T));
  t.v_align = alignment(a.v, a.extra_v, sizeof(T));
  return t;
}

struct Cut {
  int rows = 0;  // of a block's own tile, 16 per warp; 0: no cut fits this device
  int own_tiles = 0, inner_tiles = 0, stages = 0;
  size_t smem = 0;
};

// The largest tile that is no larger than needed and fits the shared memory; two buffers if there are two
// inner tiles.
template <class Bytes>
Cut cut_for(int own, int inner, int inner_tile, Bytes bytes) {
  Cut cut;
  cut.inner_tiles = std::max(1, ceil_div(inner, inner_tile));
  const size_t limit = simt::shared_memory_limit();
  const int needed = std::min(kMaxThreads / 2, round_up(std::max(own, 1), 16));
  for (int rows = needed; rows >= 16 && !cut.rows; rows = rows > 32 ? 32 : rows / 2 / 16 * 16) {
    for (int stages = std::min(2, cut.inner_tiles); stages >= 1 && !cut.rows; --stages) {
      if (bytes(rows, stages) > limit) continue;
      cut.rows = rows;
      cut.stages = stages;
      cut.smem = bytes(rows, stages);
    }
  }
  if (cut.rows) cut.own_tiles = ceil_div(own, cut.rows);
  return cut;
}

template <class... Params, class... Args>
cudaError_t launch_blocks(void (*kernel)(Params...), int64_t blocks, int threads, size_t smem,
                          cudaStream_t stream, Args... args) {
  if (blocks > 2147483647) return cudaErrorInvalidConfiguration;
  return simt::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), smem, stream, args...);
}

// What no kernel here computes; the capability row of the backend says the same.
inline cudaError_t refuse(const Attend& a) {
  const bool refused = a.dtype == kF64 || a.head_dim > kMaxHeadDim || a.head_dim_v > kMaxHeadDim ||
                       a.head_dim < 1 || a.head_dim_v < 1;
  return refused ? cudaErrorInvalidValue : cudaSuccess;
}

// Calls run(T(), integral_constant of the accumulator's columns) for the type and head dims of a.
template <class Run>
cudaError_t dispatch(const Attend& a, Run run) {
  const int widest = std::max(a.head_dim, a.head_dim_v);
  auto with_cols = [&](auto type) {
    if (widest <= 32) return run(type, std::integral_constant<int, 32>());
    if (widest <= 64) return run(type, std::integral_constant<int, 64>());
    return run(type, std::integral_constant<int, kMaxCols>());
  };
  if (a.dtype == kBF16) return with_cols(bf16());
  if (a.dtype == kF16) return with_cols(half());
  return with_cols(float());
}

}  // namespace vicinal::cuda
