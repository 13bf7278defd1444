// A small pipelined kernel in which a bug can be switched on: what the emulator must find, and in which
// build. out = (x y^T) y and sums = row sums of x y^T for x [rows, 32], y [keys, 32], values -1, 0, 1: exact
// in every order. table: per block, sums of x y^T by (row % 16 + column % 32), each warp with a table of its
// own.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "driver.h"

using namespace vicinal::simt;
using bf16 = __nv_bfloat16;

namespace {

#define FOR_EACH_BUG(X)                                                                                   \
  X(none)                                                                                                 \
  X(no_sync_after_wait)                                                                                   \
  X(no_sync_before_reuse)                                                                                 \
  X(swapped_fragment)                                                                                     \
  X(row_past_array)                                                                                       \
  X(tail_not_zeroed)                                                                                      \
  X(wait_too_short)                                                                                       \
  X(wrong_shuffle)                                                                                        \
  X(warp_skips_sync)                                                                                      \
  X(swizzle_differs)                                                                                      \
  X(read_past_tensor) X(misaligned_ldmatrix) X(too_little_shared) X(no_swizzle) X(no_sync_warp)           \
      X(ordered_by_shuffle) X(foreign_row) X(misaligned_vector) X(divergent_shuffle) X(lane_outside_mask) \
          X(copies_left) X(deadlock) X(table_unordered) X(entry_of_two_lanes) X(one_table)

enum Bug {
#define NAME(bug) bug,
  FOR_EACH_BUG(NAME)
#undef NAME
};

constexpr int kDim = 32, kRows = 64, kKeys = 32, kThreads = 128, kEntries = 48;

struct Problem {
  const bf16 *x, *y;
  float *out, *sums, *table;
  int rows, keys, bug, zero;
};

__device__ bf16* swizzled(bf16* tile, int row, int chunk, bool on) {
  return tile + row * kDim + 8 * (on ? chunk ^ (row / 2 % 4) : chunk);
}

__device__ void load_tile(bf16* tile, const bf16* source, int first, int rows, int count, const Problem& p) {
  for (int i = threadIdx.x; i < count * 4; i += kThreads) {
    const int row = i / 4, chunk = i % 4;
    const bool there = first + row < rows;
    if (!there && p.bug == tail_not_zeroed) continue;
    const bool swizzle = p.bug != no_swizzle && !(p.bug == swizzle_differs && row == 5);
    cp_async<16>(swizzled(tile, row, chunk, swizzle), source + (there ? first + row : 0) * kDim + 8 * chunk,
                 there ? 16 : 0);
  }
}

__device__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

__device__ __host__ int entry_of(int row, int column, int bug) {
  return row + (bug == entry_of_two_lanes ? column / 2 : column);
}

// table += the warp's scores s [16, 32], row after row, a column a lane, by way of `stage`.
__device__ void add_to_table(float* table, float* stage, const float (&s)[4][4], const Problem& p) {
  const int lane = threadIdx.x % 32;
  for (int n = 0; n < 4; ++n) {
    for (int i = 0; i < 4; ++i)
      stage[(lane / 4 + 8 * (i / 2)) * kDim + 8 * n + 2 * (lane % 4) + i % 2] = s[n][i];
  }
  sync_warp();
  for (int row = 0; row < 16; ++row) {
    table[entry_of(row, lane, p.bug)] += stage[row * kDim + lane];
    if (p.bug != table_unordered) sync_warp();
  }
  if (p.bug == table_unordered) sync_warp();
}

// o [16, 32] += (x y^T) y and sum [2] += row sums for one tile of keys.
__device__ void multiply(float (&o)[4][4], float (&sum)[2], bf16* xs, bf16* ys, float* table, float* stage,
                         const Problem& p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool swizzle = p.bug != no_swizzle;
  uint32_t a[2][4];
  for (int k = 0; k < 2; ++k) {
    const int row = 16 * warp + lane % 16 + (p.bug == row_past_array && warp == 3);
    const bf16* address = swizzled(xs, row, 2 * k + lane / 16, swizzle);
    ldmatrix_x4(a[k], p.bug == misaligned_ldmatrix ? address + 1 : address);
    if (p.bug == swapped_fragment) std::swap(a[k][1], a[k][2]);
  }
  float s[4][4] = {};
  for (int n = 0; n < 4; ++n) {
    uint32_t b[4];
    ldmatrix_x4(b, swizzled(ys, 8 * n + lane % 8, lane / 8, swizzle));
    for (int k = 0; k < 2; ++k) mma_m16n8k16<bf16>(s[n], a[k], b[2 * k], b[2 * k + 1]);
    sum[0] += s[n][0] + s[n][1];
    sum[1] += s[n][2] + s[n][3];
  }
  add_to_table(table, stage, s, p);
  for (int k = 0; k < 2; ++k) {
    const uint32_t left[4] = {pack(s[2 * k][0], s[2 * k][1]), pack(s[2 * k][2], s[2 * k][3]),
                              pack(s[2 * k + 1][0], s[2 * k + 1][1]), pack(s[2 * k + 1][2], s[2 * k + 1][3])};
    for (int n = 0; n < 4; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, swizzled(ys, 16 * k + lane % 16, n + lane / 16, swizzle));
      mma_m16n8k16<bf16>(o[n], left, b[0], b[1]);
      mma_m16n8k16<bf16>(o[n + 1], left, b[2], b[3]);
    }
  }
}

__device__ void store(float (&o)[4][4], float (&sum)[2], float* exchange, int first, const Problem& p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = 0; i < 2; ++i) {
    sum[i] += shfl_xor(sum[i], 1);
    sum[i] += shfl_xor(sum[i], p.bug == wrong_shuffle ? 4 : 2);
  }
  float* mine = exchange + warp * 16 * kDim;
  for (int n = 0; n < 4; ++n) {
    for (int i = 0; i < 4; ++i)
      mine[(lane / 4 + 8 * (i / 2)) * kDim + 8 * n + 2 * (lane % 4) + i % 2] = o[n][i];
  }
  if (p.bug == ordered_by_shuffle) {
    shfl(0, 0);
  } else if (p.bug != no_sync_warp) {
    sync_warp();
  }
  for (int row = 0; row < 16; ++row) {
    const int token = first + 16 * warp + row;
    const bool foreign = p.bug == foreign_row && token == first + kRows - 1;
    if (token < p.rows) p.out[token * kDim + lane] = mine[row * kDim + lane];
    if (foreign && token + 1 < p.rows) p.out[(token + 1) * kDim + lane] = mine[row * kDim + lane];
    if (token < p.rows && lane == row % 8 * 4) p.sums[token] = sum[row / 8];
  }
}

__global__ void __launch_bounds__(kThreads) kernel(Problem p) {
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  bf16* y0 = carver.take<bf16>(kKeys * kDim);
  bf16* y1 = carver.take<bf16>(kKeys * kDim);
  bf16* xs = carver.take<bf16>(kRows * kDim);
  float* exchange = carver.take<float>(kRows * kDim);
  float* tables = carver.take<float>(4 * kEntries);
  float* table = tables + (p.bug == one_table ? 0 : threadIdx.x / 32 * kEntries);
  for (int i = threadIdx.x; i < 4 * kEntries; i += kThreads) tables[i] = 0.0f;
  const int first = blockIdx.x * kRows, tiles = (p.keys + kKeys - 1) / kKeys, lane = threadIdx.x % 32;
  load_tile(xs, p.x, first, p.rows, kRows, p);
  load_tile(y0, p.y, 0, p.keys, kKeys, p);
  cp_async_commit();
  float o[4][4] = {}, sum[2] = {};
  for (int t = 0; t < tiles; ++t) {
    if (t + 1 < tiles) load_tile(t % 2 ? y0 : y1, p.y, (t + 1) * kKeys, p.keys, kKeys, p);
    if (t + 1 < tiles || p.bug != copies_left) cp_async_commit();
    if (p.bug == wait_too_short) {
      cp_async_wait<2>();
    } else {
      cp_async_wait<1>();
    }
    if (p.bug != no_sync_after_wait && !(p.bug == warp_skips_sync && threadIdx.x < 32)) sync_threads();
    if (p.bug == divergent_shuffle && lane < 16) sum[0] += shfl(0.0f, 0);
    if (p.bug == lane_outside_mask) sum[0] += shfl(0.0f, 0, 0xffffu);
    if (p.bug == deadlock && lane == 8) sync_threads();
    multiply(o, sum, xs, t % 2 ? y1 : y0, table, exchange + threadIdx.x / 32 * 16 * kDim, p);
    if (p.bug != no_sync_before_reuse) sync_threads();
  }
  if (p.bug == read_past_tensor) {
    sum[0] +=
        static_cast<float>(p.zero * static_cast<int>(*reinterpret_cast<const short*>(p.y + p.keys * kDim)));
  }
  if (p.bug == misaligned_vector)
    sum[0] += static_cast<float>(p.zero * reinterpret_cast<const uint4*>(p.x + 4)->x);
  if (p.bug == copies_left) cp_async<16>(y0 + 8 * threadIdx.x, p.y);
  for (int i = threadIdx.x; i < kEntries; i += kThreads) {
    float all = 0.0f;
    for (int warp = 0; warp < 4; ++warp) all += tables[warp * kEntries + i];
    p.table[blockIdx.x * kEntries + i] = all;
  }
  store(o, sum, exchange, first, p);
}

struct Data {
  int rows = 150, keys = 150;  // 3 blocks, 5 tiles of keys, tails in both
  std::vector<bf16> x, y;
  std::vector<float> out, sums, table, want, want_sums, scores;

  Data() : x(rows * kDim), y(keys * kDim), want(rows * kDim), want_sums(rows), scores(rows * keys) {
    unsigned random = 1;
    auto value = [&] { return static_cast<int>((random = random * 1664525u + 1013904223u) >> 24) % 3 - 1; };
    for (bf16& e : x) e = __float2bfloat16(value());
    for (bf16& e : y) e = __float2bfloat16(value());
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < keys; ++j) {
        float s = 0;
        for (int d = 0; d < kDim; ++d)
          s += __bfloat162float(x[i * kDim + d]) * __bfloat162float(y[j * kDim + d]);
        want_sums[i] += s;
        scores[i * keys + j] = s;
        for (int d = 0; d < kDim; ++d) want[i * kDim + d] += s * __bfloat162float(y[j * kDim + d]);
      }
    }
  }

  std::string run(int bug) {
    out.assign(want.size(), -1e9f);
    sums.assign(rows, -1e9f);
    const int blocks = (rows + kRows - 1) / kRows;
    std::vector<float> want_table(blocks * kEntries);
    table.assign(want_table.size(), -1e9f);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < keys; ++j)
        want_table[i / kRows * kEntries + entry_of(i % 16, j % 32, bug)] += scores[i * keys + j];
    }
    const Problem p{x.data(), y.data(), out.data(), sums.data(), table.data(), rows, keys, bug, 0};
    const size_t smem =
        (2 * kKeys + kRows) * kDim * 2 + (kRows * kDim + 4 * kEntries) * 4 - 16 * (bug == too_little_shared);
    if (launch(kernel, dim3(blocks), dim3(kThreads), smem, nullptr, p) != cudaSuccess) {
      return vicinal_host_error_text();
    }
    return out == want && sums == want_sums && table == want_table ? "" : "wrong result";
  }
};

}  // namespace

int main(int argc, char** argv) {
  const char* names[] = {
#define NAME(bug) #bug,
      FOR_EACH_BUG(NAME)
#undef NAME
  };
  const int count = argc > 2 ? std::atoi(argv[2]) : 5;
  for (int bug = 0; argc > 1 && bug <= one_table; ++bug) {
    if (strcmp(argv[1], names[bug])) continue;
    Data data;
    const bool right = under_schedules(count, [&] { return data.run(bug); });
    std::printf("bank conflicts: %ld\n", vicinal_host_bank_conflicts());
    return right ? 0 : 1;
  }
  std::printf("no such bug\n");
  return 2;
}
