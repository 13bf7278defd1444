// The one product that attend is made of: C[i][lanes] = init[i][lanes] + sum over t of A[i][t] * B[t][lanes].
//
// Lanes are queries for the scores (A = keys, B = Q^T), and the head dimension for out and the gradients
// (A = weights or their gradient, B = V, K, Q or dO). A is read one element at a time and broadcast.
#pragma once
#include "simd.h"

namespace vicinal::VICINAL_ISA {

// Called once per tile: prefetches a few rows of what comes next, since a burst of prefetches stalls like the
// loads.
struct Ahead {
  void (*step)(void* context);
  void* context;
};

template <class T>
struct Gemm {
  const T* a;
  int64_t a_stride;  // between rows i in gemm_rows, between steps t in gemm_columns
  const T* b;
  int64_t b_stride;
  const T* init;  // null: 0; may be c
  int64_t init_stride;
  T* c;
  int64_t c_stride;
  const Ahead* ahead;                // or null
  const T* const* a_rows = nullptr;  // row i of A in gemm_rows, instead of a + i * a_stride
  const T* const* b_rows = nullptr;  // step t of B, instead of b + t * b_stride
  T* const* c_rows = nullptr;        // row i of C, instead of c + i * c_stride
  const T* c_factor = nullptr;       // what row i of C is multiplied by in the end
};

// m rows, n steps, `vectors` vectors of lanes. gemm_rows: A[i][t] = a[i * a_stride + t]; gemm_columns:
// A[i][t] = a[t * a_stride + i].
template <class T>
void gemm_rows(const Gemm<T>& g, int m, int n, int vectors);
template <class T>
void gemm_columns(const Gemm<T>& g, int m, int n, int vectors);

// Widest block of vectors that the tiles of T take at once.
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileVectors = 3;
#else
constexpr int kTileVectors = 2;
#endif

}  // namespace vicinal::VICINAL_ISA
