// linear attention: what a token gets from sums and from the tokens of its run. Forward and backward are the
// same form (linear_kernels.cuh), so one kernel serves out, dq, dk and dv:
//
//   rows      left  right  column  sums
//   out_i     f     p      v       f_i S            dq_i   r  v  p   S r_i + d_i z
//   dv_j      p     f      r       p_j dS           dk_j   v  r  f   dS v_j + dz
//
// A block owns 64 rows and 64 columns, a warp 16 rows. Weights stay in registers between the two products;
// where left has more than 64 channels they are summed up over slices of it. The gradient d of a denominator
// is added to the weights in float32, before they are rounded: of few keys the two cancel.
#include "linear_kernels.cuh"

namespace vicinal::cuda {

namespace {

constexpr int kTiles = kSide / 8;  // columns of an accumulator, in eights
using Square = float[kTiles][4];

// Of this lane's accumulator elements: row and column inside the tile.
__device__ inline int row_at(int e) { return warp_row() + lane_group() + e / 2 * 8; }
__device__ inline int col_at(int n, int e) { return 8 * n + 2 * lane_pair() + e % 2; }

template <class T>
struct RowsWork {
  const LinearRows& p;
  T *left, *right, *column;
  float *row_factors, *row_slopes, *col_factors, *col_slopes, *sums;
  Decays decays;
  Run run;
  Tokens rows;
  int tile, slice, head;
  const Operand* in_left;  // whose only slice `left` holds, or null
  float half_den;          // of row threadIdx.x / 2: what this thread found of f . z
  float row_den[2];        // of this lane's two rows: sums of weights

  __device__ RowsWork(const LinearRows& params, SmemCarver& carver)
      : p(params),
        left(carver.take<T>(kSide * kRow<T>)),
        right(carver.take<T>(kSide * kRow<T>)),
        column(carver.take<T>(kSide * kRow<T>)),
        row_factors(carver.take<float>(kSide)),
        row_slopes(carver.take<float>(kSide)),
        col_factors(carver.take<float>(kSide)),
        col_slopes(carver.take<float>(kSide)),
        sums(carver.take<float>(kSide)),
        decays{carver.take<float>(kRunTiles * kSide), carver.take<float>(kRunTiles * kSide),
               carver.take<float>(kRunTiles), params.a.decay != nullptr} {}

  __device__ bool rows_are_queries() const { return p.role == kRowsOut || p.role == kRowsDq; }
  __device__ bool values_left() const { return p.role == kRowsDq || p.role == kRowsDk; }
  __device__ bool active() const { return warp_row() < rows.count; }
  __device__ const float* factors_of(const Operand& o, const float* factors) const {
    return needs_factors(p.a, o) ? factors : nullptr;
  }
  __device__ Sums states() const {
    const bool inclusive = p.a.mask == kMaskBlocksUpTo;
    return sums_for(p.states, p.runs, p.scope, inclusive, !rows_are_queries(), run, head);
  }
  __device__ float weight(int row) const {
    return rows_are_queries() ? decays.from_start(tile, row) : decays.to_end(tile, row);
  }

  __device__ void set_head(int h) {
    head = h;
    half_den = row_den[0] = row_den[1] = 0.0f;
    in_left = nullptr;
    simt::sync_threads();
    decays.load(p.a, p.runs, run, head);
    p.numbers.load(p.a, rows, head, rows_are_queries(), row_factors, row_slopes);
  }

  // half_den += features . z of this slice of `left`.
  __device__ void add_dot_z(const float* z, int width, int k_slice) {
    const int row = threadIdx.x / 2, cols = smaller(kSide, width - k_slice * kSide);
    if (row >= rows.count) return;
    for (int i = threadIdx.x % 2; i < cols; i += 2)
      half_den = fmaf(widened(left[row * kRow<T> + i]), z[k_slice * kSide + i], half_den);
  }

  // y += w_i left_i . sums.
  __device__ void read_states(Square& y) {
    const Sums s = states();
    const int depth = (p.left.width + kSide - 1) / kSide, values = p.a.dim_v;
    const bool with_den = p.den && !p.right_den.x.data;
    const int cols = slice_width(p.column.width, slice);
    for (int k = 0; p.product && k < depth; ++k) {
      simt::sync_threads();
      read_tile(left, p.left, rows, head, k, factors_of(p.left, row_factors));
      if (values_left()) {
        read_sums(right, s.s, p.column.width, p.left.width, values, slice * kSide, k * kSide);
      } else {
        read_sums(right, s.s, p.left.width, p.column.width, values, k * kSide, slice * kSide);
      }
      arrive();
      const T* own = left + warp_row() * kRow<T>;
      const int steps = slice_width(p.left.width, k);
      if (active() && values_left()) product_nt(y, own, kRow<T>, right, kRow<T>, steps, cols);
      if (active() && !values_left()) product_nn<false>(y, own, kRow<T>, right, kRow<T>, steps, cols);
      if (with_den) add_dot_z(s.z, p.left.width, k);
    }
    in_left = p.product && depth == 1 ? &p.left : nullptr;
    if (!p.product) simt::sync_threads();  // slopes and decays are there
    const bool with_z = p.slopes && p.states.z_size;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = row_at(e), col = slice * kSide + col_at(n, e);
        if (with_z && col < p.column.width) {
          y[n][e] = fmaf(rows_are_queries() ? row_slopes[row] : 1.0f, s.z[col], y[n][e]);
        }
        if (decays.on) y[n][e] *= weight(row);
      }
    }
  }

  // Whether this row sees (is seen by) a column of another or the same tile.
  __device__ bool sees(int64_t row, int64_t col) const {
    const int64_t query = rows_are_queries() ? row : col, key = rows_are_queries() ? col : row;
    if (p.a.mask == kMaskCausal) return key <= query;
    const int64_t q = query / p.a.block_size, k = key / p.a.block_size;
    return p.a.mask == kMaskBlocksBefore ? k < q : k <= q;
  }
  __device__ float decay(int row, int other, int col) const {
    if (!decays.on) return 1.0f;
    const int i = tile * kSide + row, j = other * kSide + col;
    if (tile == other) {
      return Decays::exp(rows_are_queries() ? decays.up[i] - decays.up[j] : decays.up[j] - decays.up[i]);
    }
    if (rows_are_queries()) return Decays::exp(decays.up[i] + decays.sum(other + 1, tile) + decays.down[j]);
    return Decays::exp(decays.up[j] + decays.sum(tile + 1, other) + decays.down[i]);
  }
  // m = D (m + d), 0 where a row does not see a column.
  __device__ void weigh(Square& m, const Tokens& cols, int other, bool slopes) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = row_at(e), col = col_at(n, e);
        if (8 * n >= cols.count) continue;
        if (row >= rows.count || col >= cols.count ||
            (tile == other && !sees(rows.first + row, cols.first + col))) {
          m[n][e] = 0.0f;
          continue;
        }
        const float d = slopes ? (rows_are_queries() ? row_slopes[row] : col_slopes[col]) : 0.0f;
        m[n][e] = (m[n][e] + d) * decay(row, other, col);
      }
    }
  }

  // m = left . right of the tokens of a tile; reads `column` too, if given.
  __device__ void multiply(Square& m, const Operand& of_left, const Operand& of_right,
                           const Operand* of_column, const Tokens& cols, bool product) {
    const int depth = product ? (of_left.width + kSide - 1) / kSide : 1;
    for (int k = 0; k < depth; ++k) {
      simt::sync_threads();
      if (product && in_left != &of_left) {
        read_tile(left, of_left, rows, head, k, factors_of(of_left, row_factors));
        in_left = depth == 1 ? &of_left : nullptr;
      }
      if (product) {
        read_tile(right, of_right, cols, head, k, factors_of(of_right, col_factors));
      }
      if (k == 0 && of_column) {
        read_tile(column, *of_column, cols, head, slice, factors_of(*of_column, col_factors));
      }
      arrive();
      if (!product || !active()) continue;
      product_nt(m, left + warp_row() * kRow<T>, kRow<T>, right, kRow<T>, slice_width(of_left.width, k),
                 up_to_16(cols.count));
    }
  }

  // As rounded for the product: then out is a mean of values, whatever the rounding.
  __device__ void add_weights(const Square& m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) row_den[e / 2] += widened(rounded<T>(m[n][e]));
    }
  }

  // y += what comes from the tokens of the run.
  __device__ void read_run(Square& y) {
    const int first = rows_are_queries() ? 0 : tile, last = rows_are_queries() ? tile + 1 : p.tiles;
    for (int other = first; other < last; ++other) {
      const Tokens cols = tokens_of(p.runs, run, other);
      if (cols.count <= 0) break;
      simt::sync_threads();
      p.numbers.load(p.a, cols, head, !rows_are_queries(), col_factors, col_slopes);
      Square m = {};
      simt::sync_threads();
      multiply(m, p.left, p.right, &p.column, cols, p.product);
      if (active()) {
        weigh(m, cols, other, p.slopes);
        product_pn<T>(y, m, column, kRow<T>, cols.count, slice_width(p.column.width, slice));
      }
      const bool with_den = p.den;
      if (with_den && !p.right_den.x.data) add_weights(m);
      if (!with_den || !p.right_den.x.data) continue;
      Square w = {};
      multiply(w, p.left_den, p.right_den, nullptr, cols, true);
      if (active()) weigh(w, cols, other, false);
      add_weights(w);
    }
  }

  // After everything else: sums[row] = den with eps.
  __device__ void finish_den() {
    if (p.right_den.x.data) {
      const Sums s = states();
      in_left = nullptr;
      for (int k = 0; k * kSide < p.left_den.width; ++k) {
        simt::sync_threads();
        read_tile(left, p.left_den, rows, head, k, nullptr);
        arrive();
        add_dot_z(s.z, p.left_den.width, k);
      }
    }
    simt::sync_threads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = row_sum(row_den[r]);
      if (lane_pair() == 0) sums[row_at(2 * r)] = sum;
    }
    simt::sync_threads();
    const float of_z = half_den + simt::shfl_xor(half_den, 1);
    const int row = threadIdx.x / 2;
    if (threadIdx.x % 2 == 0) {
      sums[row] += of_z * (row < rows.count ? weight(row) : 0.0f) + static_cast<float>(p.a.eps);
    }
    simt::sync_threads();
  }
};

__device__ inline void store_pair(const Strided& x, DType dtype, int64_t at, float low, float high, bool both,
                                  bool pairs) {
  if (pairs && both && dtype != kF32) {
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(x.data) + at) =
        dtype == kBF16 ? pack<bf16>(low, high) : pack<half>(low, high);
    return;
  }
  store_value(x, dtype, at, low);
  if (both) store_value(x, dtype, at + x.stride_d, high);
}

// out, or num . dout; dv.
template <class T>
__device__ void finish_values(RowsWork<T>& w, const Square& y) {
  const LinearRows& p = w.p;
  if (p.den) w.finish_den();
  const int64_t base = (w.rows.sample * p.a.heads + w.head) * p.a.n_q + w.rows.begin;
  if (p.den && w.slice == 0 && static_cast<int>(threadIdx.x) < w.rows.count)
    p.den[base + threadIdx.x] = w.sums[threadIdx.x];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row_at(2 * r);
    float dot = 0.0f;
    if (row < w.rows.count) {
      const float factor = p.den ? inverse_of(w.sums[row]) : 1.0f;
      const Strided& x = p.dots ? p.own.x : p.to;
      const int64_t at = offset_of(x, w.rows.sample, w.rows.begin + row, w.head);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int col = w.slice * kSide + col_at(n, 0), left = p.a.dim_v - col;
        if (left <= 0) continue;
        if (!p.dots) {
          store_pair(x, p.a.dtype, at + col * x.stride_d, factor * y[n][2 * r], factor * y[n][2 * r + 1],
                     left > 1, p.pairs);
          continue;
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (e >= left) continue;
          const float dout = load_value(x.data, p.a.dtype, at + (col + e) * x.stride_d);
          dot = fmaf(y[n][2 * r + e], widened(rounded<T>(w.row_factors[row] * dout)), dot);
        }
      }
    }
    dot = row_sum(dot);
    if (p.dots && lane_pair() == 0 && row < w.rows.count) {
      p.dots[w.slice * p.a.batch * p.a.heads * p.a.n_q + base + row] = dot;
    }
  }
}

// Of features: y . f of this head, in the precision of the products, so that what cancels between queries and
// keys does.
template <class T>
__device__ void store_overlaps(const RowsWork<T>& w, const Square& y, float* to) {
  const LinearRows& p = w.p;
  const Operand& o = p.own;
  const int64_t per_part = p.a.batch * p.a.heads * p.a.n_k;
  const int64_t base = (w.rows.sample * p.a.heads + w.head) * p.a.n_k + w.rows.begin;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row_at(2 * r);
    const bool there = row < w.rows.count && !(o.keys && w.row_factors[row] == 0.0f);
    float dot = 0.0f;
    const int64_t at = there ? offset_of(o.x, w.rows.sample, w.rows.begin + row, w.head / o.shared) : 0;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int col = w.slice * kSide + col_at(n, e);
        if (!there || col >= o.width) continue;
        float value = o.constant;
        if (col < o.dim) {
          value = o.factor * mapped(o.map, o.param, load_value(o.x.data, o.dtype, at + col * o.x.stride_d)).x;
        }
        dot = fmaf(widened(rounded<T>(value)), y[n][2 * r + e], dot);
      }
    }
    dot = row_sum(dot);
    if (lane_pair() == 0 && row < w.rows.count) {
      to[w.slice * per_part + base + row] = there ? dot : 0.0f;
    }
  }
}

// The gradient of q, k or of the denominator's features.
template <class T>
__device__ void store_features(const RowsWork<T>& w, const Square& y) {
  const LinearRows& p = w.p;
  const Operand& o = p.own;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row_at(2 * r);
    if (row >= w.rows.count) continue;
    const bool ignored = o.keys && w.row_factors[row] == 0.0f;
    const int64_t from = offset_of(o.x, w.rows.sample, w.rows.begin + row, w.head / o.shared);
    const int64_t to = offset_of(p.to, w.rows.sample, w.rows.begin + row, w.head / o.shared);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int col = w.slice * kSide + col_at(n, 0), left = o.dim - col;
      if (left <= 0) continue;
      float grad[2] = {};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (ignored || e >= left) continue;
        const float x = load_value(o.x.data, o.dtype, from + (col + e) * o.x.stride_d);
        grad[e] = o.factor * mapped(o.map, o.param, x).y * y[n][2 * r + e];
      }
      store_pair(p.to, p.a.dtype, to + col * p.to.stride_d, grad[0], grad[1], left > 1, p.pairs);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) linear_rows_kernel(const __grid_constant__ LinearRows p) {
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  RowsWork<T> w(p, carver);
  uint32_t block = blockIdx.x;
  w.slice = take_index(block, p.slices);
  const int first_head = take_index(block, p.a.heads / p.group) * p.group;
  w.tile = take_index(block, p.tiles);
  w.run = run_of(p.runs, block);
  w.rows = tokens_of(p.runs, w.run, w.tile);
  if (w.rows.count <= 0) return;
  Square total = {};
  for (int g = 0; g < p.group; ++g) {
    Square y = {};
    w.set_head(first_head + g);
    w.read_states(y);
    if (p.state_overlaps) store_overlaps(w, y, p.state_overlaps);
    if (p.scope == kWithin) w.read_run(y);
    if (p.role == kRowsOut || p.role == kRowsDv) return finish_values(w, y);
    if (p.overlaps) store_overlaps(w, y, p.overlaps);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) total[n][e] += y[n][e];
    }
  }
  store_features(w, total);
}

}  // namespace

template <class T>
cudaError_t launch_rows(const LinearRows& p, cudaStream_t stream) {
  const size_t smem = 3 * smem_of<T>(kSide * kRow<T>) + 5 * smem_of<float>(kSide) +
                      2 * smem_of<float>(kRunTiles * kSide) + smem_of<float>(kRunTiles);
  const int64_t blocks = p.to.data || p.dots ? p.runs.slots * p.tiles * (p.a.heads / p.group) * p.slices : 0;
  return blocks ? launch_blocks(linear_rows_kernel<T>, blocks, kMaxThreads, smem, stream, p) : cudaSuccess;
}

template cudaError_t launch_rows<bf16>(const LinearRows&, cudaStream_t);
template cudaError_t launch_rows<tf32>(const LinearRows&, cudaStream_t);
template cudaError_t launch_rows<float>(const LinearRows&, cudaStream_t);

}  // namespace vicinal::cuda
