// The primitives of simt.h on integer data, against the fragment layouts written as strides over the whole
// tile (one linear offset per lane and element), which is another formula than the emulator's.
#include <cstring>

#include "driver.h"

using namespace vicinal::simt;

namespace {

struct Offset {
  int row, col;
};
__device__ Offset a_16(int lane, int i) {
  const int at = 32 * (lane % 4) + lane / 4 + 16 * (i % 2) + 8 * (i / 2 % 2) + 128 * (i / 4);
  return {at % 16, at / 16};
}
__device__ Offset b_16(int lane, int i) {  // row: n, col: k
  const int at = 16 * (lane % 4) + lane / 4 + 8 * (i % 2) + 64 * (i / 2);
  return {at % 8, at / 8};
}
__device__ Offset a_8(int lane, int i) {
  const int at = 16 * (lane % 4) + lane / 4 + 8 * (i % 2) + 64 * (i / 2);
  return {at % 16, at / 16};
}
__device__ Offset b_8(int lane, int i) {
  const int at = 8 * (lane % 4) + lane / 4 + 32 * i;
  return {at % 8, at / 8};
}
__device__ Offset c(int lane, int i) {
  const int at = 32 * (lane % 4) + lane / 4 + 16 * (i % 2) + 8 * (i / 2);
  return {at % 16, at / 16};
}

template <class T>
__device__ T from_int(int value) {
  if constexpr (sizeof(T) == 4) return static_cast<float>(value);
  if constexpr (std::is_same_v<T, __half>) return __float2half(static_cast<float>(value));
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16(static_cast<float>(value));
}

struct Tiles {
  const int *a, *b;  // [16, depth], [8, depth]
  float* out;        // [16, 8], starts as the accumulator
};

template <class T>
__device__ void fill(T* fragment, int count, const int* tile, int depth, Offset (*where)(int, int)) {
  for (int i = 0; i < count; ++i) {
    const Offset at = where(threadIdx.x, i);
    fragment[i] = from_int<T>(tile[at.row * depth + at.col]);
  }
}

template <class T>
__global__ void mma_kernel(Tiles p) {
  const int lane = threadIdx.x;
  constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;
  T a[16 / sizeof(T)], b[8 / sizeof(T)];
  fill(a, 16 / sizeof(T), p.a, kDepth, sizeof(T) == 2 ? a_16 : a_8);
  fill(b, 8 / sizeof(T), p.b, kDepth, sizeof(T) == 2 ? b_16 : b_8);
  uint32_t a_bits[4], b_bits[2];
  memcpy(a_bits, a, sizeof a);
  memcpy(b_bits, b, sizeof b);
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = p.out[c(lane, i).row * 8 + c(lane, i).col];
  if constexpr (sizeof(T) == 2) {
    mma_m16n8k16<T>(sums, a_bits, b_bits[0], b_bits[1]);
  } else {
    a_bits[0] |= 0x1fff;  // bits that the tensor core drops
    mma_m16n8k8_tf32(sums, a_bits, b_bits[0], b_bits[1]);
  }
  for (int i = 0; i < 4; ++i) p.out[c(lane, i).row * 8 + c(lane, i).col] = sums[i];
}

template <class T>
std::string multiplies(const char* name) {
  constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;
  Vector<int> a(16 * kDepth), b(8 * kDepth);
  for (int i = 0; i < 16 * kDepth; ++i) a[i] = i * 7 % 23 - 11;
  for (int i = 0; i < 8 * kDepth; ++i) b[i] = i * 5 % 19 - 9;
  Vector<float> out(128), want(128);
  for (int i = 0; i < 128; ++i) {
    want[i] = out[i] = static_cast<float>(i);
    for (int k = 0; k < kDepth; ++k)
      want[i] += static_cast<float>(a[i / 8 * kDepth + k] * b[i % 8 * kDepth + k]);
  }
  const Tiles tiles{a.data(), b.data(), out.data()};
  return done(launch(mma_kernel<T>, dim3(1), dim3(32), 0, nullptr, tiles)) && out == want ? "" : name;
}

// Loads a [16, 16] tile and its transpose with ldmatrix; counts elements that are not where the layouts want
// them.
__global__ void ldmatrix_kernel(int* wrong) {
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  auto* tile = carver.take<uint16_t>(256);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile[i] = static_cast<uint16_t>(i);
  sync_warp();
  uint16_t values[8];
  uint32_t four[4], two[2];
  auto check = [&](const void* bits, int count, auto want) {
    memcpy(values, bits, 2 * count);
    for (int i = 0; i < count; ++i) wrong[lane] += values[i] != want(i);
  };
  auto at = [](int row, int col) { return 16 * row + col; };
  ldmatrix_x4(four, tile + 16 * (lane % 16) + 8 * (lane / 16));
  check(four, 8, [&](int i) { return at(a_16(lane, i).row, a_16(lane, i).col); });
  ldmatrix_x4_trans(four, tile + 16 * (lane % 16) + 8 * (lane / 16));  // [k, n]: two B fragments side by side
  check(four, 8, [&](int i) { return at(b_16(lane, i % 4).col, b_16(lane, i % 4).row + 8 * (i / 4)); });
  ldmatrix_x2(two, tile + 16 * (lane % 8) + 8 * (lane / 8 % 2));
  check(two, 4, [&](int i) { return at(b_16(lane, i).row, b_16(lane, i).col); });
  ldmatrix_x2_trans(two, tile + 16 * (lane % 16));
  check(two, 4, [&](int i) { return at(b_16(lane, i).col, b_16(lane, i).row); });
}

std::string loads_matrices() {
  Vector<int> wrong(32);
  const cudaError_t error = launch(ldmatrix_kernel, dim3(1), dim3(32), 512, nullptr, wrong.data());
  return done(error) && wrong == Vector<int>(32) ? "" : "ldmatrix";
}

__global__ void copy_kernel(const unsigned char* from, unsigned char* to) {
  DYN_SMEM(raw);
  SmemCarver carver(raw);
  auto* shared = carver.take<unsigned char>(64 * 16);
  const int i = threadIdx.x;
  if (i < 17) cp_async<16>(shared + 16 * i, from, i);
  if (i >= 17 && i < 26) cp_async<8>(shared + 16 * i, from + 8, i - 17);
  if (i >= 26 && i < 31) cp_async<4>(shared + 16 * i, from + 4, i - 26);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();
  for (int j = 0; j < 16; ++j) to[16 * i + j] = shared[16 * (63 - i) + j];
}

std::string copies() {
  Vector<unsigned char> from(16), to(1024);
  for (int i = 0; i < 16; ++i) from[i] = static_cast<unsigned char>(100 + i);
  const unsigned char* source = from.data();
  if (!done(launch(copy_kernel, dim3(1), dim3(64), 1024, nullptr, source, to.data())))
    return "cp.async launch";
  for (int i = 0; i < 31; ++i) {
    const int bytes = i < 17 ? 16 : i < 26 ? 8 : 4, valid = i < 17 ? i : i < 26 ? i - 17 : i - 26;
    for (int j = 0; j < 16; ++j) {
      const int at = (bytes == 16 ? 0 : bytes) + j;
#ifdef __CUDACC__
      if (j >= bytes) continue;
#endif
      const int want = j >= bytes ? 0xff : j < valid ? from[at] : 0;  // 0xff: the emulator's poison
      if (to[16 * (63 - i) + j] != want) return "cp.async";
    }
  }
  return "";
}

// Shuffles in two halves of a warp at once, of 4 and 8 bytes, and threads of a partial last warp.
__global__ void shuffle_kernel(int* out) {
  const int id = threadIdx.x + blockDim.x * threadIdx.y;
  const unsigned half = id % 32 < 16 ? 0xffffu : 0xffff0000u;
  int sum = 0;
  if (id < 32) {
    sum = shfl_xor(id, 3, half) + 100 * shfl(id, id % 32 < 16 ? 5 : 20, half);
  } else {
    sum = static_cast<int>(shfl_xor(1.5 * id, 1) * 2);
  }
  out[id] = sum;
}

std::string shuffles() {
  Vector<int> out(40);
  if (!done(launch(shuffle_kernel, dim3(1), dim3(8, 5), 0, nullptr, out.data()))) return "shfl launch";
  for (int id = 0; id < 40; ++id) {
    if (out[id] != (id < 32 ? (id ^ 3) + 100 * (id < 16 ? 5 : 20) : 3 * (id ^ 1))) return "shfl";
  }
  return "";
}

__global__ void grid_kernel(int* seen) {
  seen[blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)] += static_cast<int>(blockDim.x) + 1;
}

std::string visits_every_block() {
  Vector<int> seen(30);
  const cudaError_t error = launch(grid_kernel, dim3(5, 3, 2), dim3(1), 0, nullptr, seen.data());
  if (!done(error) || seen != Vector<int>(30, 2)) return "grid";
  return launch(grid_kernel, dim3(1), dim3(1025), 0, nullptr, seen.data()) == cudaSuccess ? "launch limits"
                                                                                          : "";
}

}  // namespace

int main() {
  const bool right = under_schedules(5, [] {
    return multiplies<__nv_bfloat16>("mma bf16 ") + multiplies<__half>("mma f16 ") +
           multiplies<float>("mma tf32 ") + loads_matrices() + copies() + shuffles() + visits_every_block();
  });
  return right ? 0 : 1;
}
