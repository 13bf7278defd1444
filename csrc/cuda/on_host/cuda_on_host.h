// The primitives of simt.h on a CPU, kernel side. Test builds only.
//
// This half is compiled together with the kernel, with the same sanitizers, so that every load and store of a
// kernel, those of cp.async and ldmatrix included, is attributed to the CUDA thread that makes it. The other
// half (cuda_on_host.cpp: fibers, scheduler, rendezvous) is always compiled without sanitizers; the two share
// no inline function and no template.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <source_location>
#include <tuple>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static_assert(false, "use DYN_SMEM and SmemCarver");
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::vicinal::on_host::current->thread_idx)
#define blockIdx (::vicinal::on_host::current->block_idx)
#define blockDim (::vicinal::on_host::current->block_dim)
#define gridDim (::vicinal::on_host::current->grid_dim)

#define DYN_SMEM(name) unsigned char* name = ::vicinal::on_host::shared_base()

namespace vicinal::on_host {

enum Order : int { kForward, kReverse, kRandomOrder };  // which runnable thread goes on: lowest, highest, any
enum Copies : int { kEager, kLazy, kRandomCopies };     // when cp.async copies: at once, at the wait, either

using Place = std::source_location;  // line of a primitive, filled in by default arguments

struct Thread {
  uint3 thread_idx, block_idx;
  dim3 block_dim, grid_dim;
};
extern Thread* current;

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, valid;
};

enum Op : int { kSyncWarp, kShuffle, kLdmatrix, kMmaBf16, kMmaF16, kMmaTf32 };

struct ShuffleArgs {
  uint64_t value;
  int from_lane;
};
struct LdmatrixArgs {
  uint32_t* out;
  const void* row;
  int matrices;
  bool transposed;
  uint32_t data[4];
};
struct MmaArgs {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

unsigned char* shared_base();
size_t shared_limit();
unsigned char* take_shared(unsigned char** next, size_t* used, size_t bytes, Place at);
void sync_block(Place at);
void collective(Op op, unsigned mask, void* args, Place at);
int lane_id();
void check_copy(const Copy& copy, Place at);
bool copy_at_once();
void queue_copy(const Copy& copy);
void commit_copies();
bool next_copy(int groups_left, Copy* copy);
void check_aligned(const void* pointer, int bytes, const char* what, Place at);
void lane_outside(int lane, Place at);
cudaError_t run_grid(void (*entry)(void*), void* args, dim3 grid, dim3 block, size_t smem);

inline void move_bytes(const Copy& copy) {
  for (int i = 0; i < copy.bytes; i += 4) {
    if (i + 4 <= copy.valid) {
      *reinterpret_cast<uint32_t*>(copy.to + i) = *reinterpret_cast<const uint32_t*>(copy.from + i);
    } else {
      for (int j = i; j < i + 4; ++j) copy.to[j] = j < copy.valid ? copy.from[j] : 0;
    }
  }
}

}  // namespace vicinal::on_host

// For test drivers. After a launch that failed (deadlock, divergent collective, ...),
// vicinal_host_error_text() says what was wrong.
extern "C" {
void vicinal_host_schedule(int order, int copies, unsigned seed);
const char* vicinal_host_error_text();
void vicinal_host_shared_memory(size_t bytes);  // limit of a block; 227 KiB at first
size_t vicinal_host_largest_block();            // most shared memory of a launch so far
long vicinal_host_bank_conflicts();             // extra shared-memory cycles of all ldmatrix calls so far
}

namespace vicinal::simt {

inline constexpr unsigned kFullWarp = 0xffffffffu;

class SmemCarver {
 public:
  explicit SmemCarver(unsigned char* base) : next_(base) {}
  template <class T>
  T* take(int count, on_host::Place at = on_host::Place::current()) {
    return reinterpret_cast<T*>(on_host::take_shared(&next_, &used_, count * sizeof(T), at));
  }

 private:
  unsigned char* next_;
  size_t used_ = 0;
};

inline void sync_threads(on_host::Place at = on_host::Place::current()) { on_host::sync_block(at); }
inline void sync_warp(unsigned mask = kFullWarp, on_host::Place at = on_host::Place::current()) {
  on_host::collective(on_host::kSyncWarp, mask, nullptr, at);
}

template <class T>
T shfl(T value, int lane, unsigned mask = kFullWarp, on_host::Place at = on_host::Place::current()) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  if (lane < 0 || lane > 31 || !(mask >> lane & 1)) on_host::lane_outside(lane, at);
  on_host::ShuffleArgs args{0, lane};
  __builtin_memcpy(&args.value, &value, sizeof(T));
  on_host::collective(on_host::kShuffle, mask, &args, at);
  __builtin_memcpy(&value, &args.value, sizeof(T));
  return value;
}

template <class T>
T shfl_xor(T value, int lane_mask, unsigned mask = kFullWarp, on_host::Place at = on_host::Place::current()) {
  return shfl(value, on_host::lane_id() ^ lane_mask, mask, at);
}

inline void load_matrices(uint32_t* out, const void* row, int matrices, bool transposed, on_host::Place at) {
  on_host::LdmatrixArgs args{out, row, matrices, transposed, {}};
  if (on_host::lane_id() < 8 * matrices) {
    on_host::check_aligned(row, 16, "ldmatrix row", at);
    for (int i = 0; i < 4; ++i) args.data[i] = static_cast<const uint32_t*>(row)[i];
  }
  on_host::collective(on_host::kLdmatrix, kFullWarp, &args, at);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, on_host::Place at = on_host::Place::current()) {
  load_matrices(r, row, 4, false, at);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row,
                              on_host::Place at = on_host::Place::current()) {
  load_matrices(r, row, 4, true, at);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, on_host::Place at = on_host::Place::current()) {
  load_matrices(r, row, 2, false, at);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row,
                              on_host::Place at = on_host::Place::current()) {
  load_matrices(r, row, 2, true, at);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  on_host::Place at = on_host::Place::current()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  on_host::MmaArgs args{c, a, {b0, b1}};
  on_host::collective(std::is_same_v<T, __half> ? on_host::kMmaF16 : on_host::kMmaBf16, kFullWarp, &args, at);
}

inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             on_host::Place at = on_host::Place::current()) {
  on_host::MmaArgs args{c, a, {b0, b1}};
  on_host::collective(on_host::kMmaTf32, kFullWarp, &args, at);
}

template <int kBytes>
void cp_async(void* shared, const void* global, int valid = kBytes,
              on_host::Place at = on_host::Place::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  on_host::Copy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), kBytes,
                     valid};
  on_host::check_copy(copy, at);
  if (on_host::copy_at_once()) return on_host::move_bytes(copy);
  for (int i = 0; i < kBytes; i += 4) *reinterpret_cast<uint32_t*>(copy.to + i) = 0xffffffffu;
  on_host::queue_copy(copy);
}

inline void cp_async_commit() { on_host::commit_copies(); }

template <int kGroups>
void cp_async_wait() {
  on_host::Copy copy;
  while (on_host::next_copy(kGroups, &copy)) on_host::move_bytes(copy);
}

inline float ex2(float x) { return exp2f(x); }

inline int multiprocessors() { return 1; }
inline size_t shared_memory_limit() { return on_host::shared_limit(); }

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem, cudaStream_t,
                   Args... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  } call{kernel, std::tuple<Params...>(args...)};
  auto entry = [](void* call) {
    std::apply(static_cast<Call*>(call)->kernel, static_cast<Call*>(call)->params);
  };
  return on_host::run_grid(entry, &call, grid, block, smem);
}

}  // namespace vicinal::simt
