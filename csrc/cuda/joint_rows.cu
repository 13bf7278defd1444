// joint attention: out, and every gradient, as sums of products of tiles (JointRows). A block owns 64 tokens
// of a group and 64 columns of v and of u together, which share the tile of weights; a warp 16 tokens. The
// gate acts on the accumulators of both.
#include "joint.cuh"

namespace vicinal::cuda {

namespace {

constexpr int kTiles = kSide / 8;
using Square = float[kTiles][4];

template <class T>
struct JointWork {
  const JointRows& p;
  T *left, *right[2];
  float *own_seen, *seen;  // 0: ignored
  int64_t batch, group;
  int tile, slice;
  Tokens rows;

  __device__ JointWork(const JointRows& params, SmemCarver& carver)
      : p(params),
        left(carver.take<T>(kSide * kRow<T>)),
        right{carver.take<T>(kSide * kRow<T>), carver.take<T>(kSide * kRow<T>)},
        own_seen(carver.take<float>(kSide)),
        seen(carver.take<float>(kSide)) {}

  __device__ bool active() const { return warp_row() < rows.count; }
  __device__ void load_seen(float* to, const Tokens& t) const {
    for (int i = threadIdx.x; i < kSide; i += kMaxThreads) {
      const bool ignored = i < t.count && p.a.ignored && p.a.ignored[batch * p.a.n + t.begin + i];
      to[i] = i < t.count && !ignored ? 1.0f : 0.0f;
    }
  }

  __device__ void read_group(Square (&y)[2]) {
    const int first = p.a.causal && p.transposed ? tile : 0;
    const int last = p.a.causal && !p.transposed ? tile + 1 : p.tiles;
    for (int other = first; other < last; ++other) {
      const Tokens cols = group_tile(p.a, batch, group, other);
      if (cols.count <= 0) break;
      simt::sync_threads();
      load_seen(seen, cols);
      simt::sync_threads();
      if (p.transposed) {
        read_tile(left, p.pairs, cols, 0, tile, nullptr);
      } else {
        read_tile(left, p.pairs, rows, 0, other, nullptr);
      }
      for (int i = 0; i < 2; ++i) {
        if (p.columns[i].x.data)
          read_tile(right[i], p.columns[i], cols, 0, slice, p.columns[i].keys ? seen : nullptr);
      }
      arrive();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!p.columns[i].x.data || !active()) continue;
        const int width = slice_width(p.columns[i].width, slice), depth = up_to_16(cols.count);
        if (p.transposed) {
          product_nn<true>(y[i], left + warp_row(), kRow<T>, right[i], kRow<T>, depth, width);
        } else {
          product_nn<false>(y[i], left + warp_row() * kRow<T>, kRow<T>, right[i], kRow<T>, depth, width);
        }
      }
    }
  }

  // left state, where columns are those of the state.
  __device__ void read_memory(Square (&y)[2], const float* state) {
    const int width = static_cast<int>(p.a.u.data ? 2 * p.a.dim_v : p.a.dim_v);
    for (int k = 0; k * kSide < p.a.dim; ++k) {
      simt::sync_threads();
      read_tile(left, p.left[0], rows, 0, k, p.left[0].keys ? own_seen : nullptr);
      for (int i = 0; i * p.a.dim_v < width; ++i) {
        const int col = i * p.a.dim_v + slice * kSide, end = (i + 1) * p.a.dim_v;
        read_sums(right[i], state, p.a.dim, end, width, k * kSide, col);
      }
      arrive();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i * p.a.dim_v >= width || !active()) continue;
        product_nn<false>(y[i], left + warp_row() * kRow<T>, kRow<T>, right[i], kRow<T>,
                          slice_width(p.a.dim, k), slice_width(p.a.dim_v, slice));
      }
    }
  }
  // left state^T, over all columns of the state.
  __device__ void read_values(Square& y, const float* state) {
    const int width = static_cast<int>(p.a.u.data ? 2 * p.a.dim_v : p.a.dim_v);
    for (int i = 0; i < 2; ++i) {
      for (int k = 0; p.left[i].x.data && k * kSide < p.a.dim_v; ++k) {
        const int col = i * p.a.dim_v + k * kSide, end = (i + 1) * p.a.dim_v;
        simt::sync_threads();
        read_tile(left, p.left[i], rows, 0, k, p.left[i].keys ? own_seen : nullptr);
        read_sums(right[0], state, p.a.dim, end, width, slice * kSide, col);
        arrive();
        if (!active()) continue;
        product_nt(y, left + warp_row() * kRow<T>, kRow<T>, right[0], kRow<T>, slice_width(p.a.dim_v, k),
                   slice_width(p.a.dim, slice));
      }
    }
  }

  // Both results of one element, the gate applied.
  __device__ void store(int row, int col, float of_v, float of_u) const {
    const Joint& a = p.a;
    const int64_t token = rows.begin + row;
    const bool gated = a.gate && p.role != kJointPlain;
    if (gated) {
      const float v = load_matrix(a.v, a.dtype, batch, token, col);
      const float u = load_matrix(a.u, a.dtype, batch, token, col);
      if (p.role == kJointOut) {
        const Gate gate(v, u, of_v, of_u);
        store_at(p.out, row, col, of_u * v * gate.t);
        for (int i = 0; i < 2; ++i) {
          if (p.inner[i].data) store_at(p.inner[i], row, col, i ? of_u : of_v);
        }
        return;
      }
      const Gate gate(v, u, load_from(p.inner[0], row, col), load_from(p.inner[1], row, col));
      const float dy = load_from(p.out, row, col);
      of_v += dy * gate.of_u * gate.t;
      of_u += gate.slope(dy) * gate.of_v;
    }
    if (p.to[0].data) store_at(p.to[0], row, col, p.factor * of_v);
    if (p.to[1].data) store_at(p.to[1], row, col, p.factor * of_u);
  }
  __device__ int64_t offset(const Strided& x, int row, int col) const {
    return offset_of(x, batch, rows.begin + row, 0) + col;
  }
  __device__ void store_at(const Strided& x, int row, int col, float value) const {
    store_value(x, p.a.dtype, offset(x, row, col), value);
  }
  __device__ float load_from(const Strided& x, int row, int col) const {
    return load_value(x.data, p.a.dtype, offset(x, row, col));
  }
};

template <class T>
__global__ void __launch_bounds__(kMaxThreads) joint_rows_kernel(const __grid_constant__ JointRows p) {
  const Joint& a = p.a;
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  JointWork<T> w(p, carver);
  uint32_t block = blockIdx.x;
  w.slice = take_index(block, p.slices);
  w.tile = take_index(block, p.tiles);
  const int64_t groups = (a.n + a.group - 1) / a.group, states = a.causal ? groups : 1;
  w.group = block % groups, w.batch = block / groups;
  w.rows = group_tile(a, w.batch, w.group, w.tile);
  if (w.rows.count <= 0) return;
  w.load_seen(w.own_seen, w.rows);
  Square y[2] = {};
  if (p.pairs.x.data) w.read_group(y);
  if (p.state) {
    const int64_t width = a.u.data ? 2 * a.dim_v : a.dim_v;
    const float* state = p.state + (w.batch * states + (a.causal ? w.group : 0)) * a.dim * width;
    if (p.by_values) {
      w.read_values(y[0], state);
    } else {
      w.read_memory(y, state);
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = warp_row() + lane_group() + e / 2 * 8;
      const int col = w.slice * kSide + 8 * n + 2 * lane_pair() + e % 2;
      if (row < w.rows.count && col < p.width) w.store(row, col, y[0][n][e], y[1][n][e]);
    }
  }
}

}  // namespace

template <class T>
cudaError_t launch_joint_rows(const JointRows& p, cudaStream_t stream) {
  const size_t smem = 3 * smem_of<T>(kSide * kRow<T>) + 2 * smem_of<float>(kSide);
  const int64_t blocks = p.a.batch * p.a.groups() * p.tiles * p.slices;
  return launch_blocks(joint_rows_kernel<T>, blocks, kMaxThreads, smem, stream, p);
}

template cudaError_t launch_joint_rows<bf16>(const JointRows&, cudaStream_t);
template cudaError_t launch_joint_rows<tf32>(const JointRows&, cudaStream_t);
template cudaError_t launch_joint_rows<float>(const JointRows&, cudaStream_t);

}  // namespace vicinal::cuda
