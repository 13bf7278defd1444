// Register tiles of tile_rows(vectors) x vectors accumulators: 88-98% of the FMA rate on operands in the
// first-level cache.
//
// Rows by addresses take 8 rows at most: with 12 of them the general registers spill and 16 x 16 windows lose
// 6%. bfloat16 has tiles of its own (gemm_pairs.cpp) where the machine multiplies pairs; half, and bfloat16
// elsewhere, is packed to float before.
#include "gemm.h"

namespace vicinal::VICINAL_ISA {
namespace {

// How A[i][t] is found: rows at a stride, rows by their addresses, or columns at a stride.
enum Access { kRows, kAddresses, kColumns };

// Rows that leave registers for the vectors of B and a broadcast, and general registers for addresses.
constexpr int tile_rows(int vectors, Access access) {
#if defined(__AVX512F__)
  const int rows = vectors == 1 ? 12 : 24 / vectors;
#elif defined(__AVX2__)
  const int rows = vectors == 1 ? 8 : 12 / vectors;
#else
  const int rows = vectors == 1 ? 6 : 4;
#endif
  return access == kAddresses && rows > 8 ? 8 : rows;
}

template <class T, int kVectors, int kCount, Access kAccess>
void tile(const Gemm<T>& g, int i0, int v0, int n) {
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[kCount][kVectors];
  const T* init = g.init ? g.init + i0 * g.init_stride + v0 * lanes : nullptr;
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      acc[i][v] = init ? load(init + i * g.init_stride + v * lanes) : Vec<T>{};
  }
  const T* a_row[kCount];
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i) a_row[i] = kAccess == kAddresses ? g.a_rows[i0 + i] : nullptr;
  const T* a = kAccess == kColumns ? g.a + i0 : g.a + i0 * g.a_stride;
  for (int t = 0; t < n; ++t) {
    const T* b = (g.b_rows ? g.b_rows[t] : g.b + t * g.b_stride) + v0 * lanes;
    Vec<T> bv[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) bv[v] = load(b + v * lanes);
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) {
      const T x = kAccess == kColumns ? a[i] : kAccess == kRows ? a[i * g.a_stride] : a_row[i][t];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] += bv[v] * x;
    }
    a += kAccess == kColumns ? g.a_stride : 1;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i) {
    T* c = (g.c_rows ? g.c_rows[i0 + i] : g.c + (i0 + i) * g.c_stride) + v0 * lanes;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (g.c_factor) acc[i][v] *= g.c_factor[i0 + i];
      store(c + v * lanes, acc[i][v]);
    }
  }
}

template <class T, int kVectors, Access kAccess, int... kCounts>
void strip(const Gemm<T>& g, int m, int v0, int n, std::integer_sequence<int, kCounts...>) {
  using Tile = void (*)(const Gemm<T>&, int, int, int);
  static constexpr Tile tiles[] = {&tile<T, kVectors, kCounts + 1, kAccess>...};
  constexpr int most = sizeof...(kCounts);
  const int count = (m + most - 1) / most;
  for (int u = 0, i0 = 0; u < count; ++u) {  // as even as possible
    const int rows = (m - i0) / (count - u);
    if (g.ahead) g.ahead->step(g.ahead->context);
    tiles[rows - 1](g, i0, v0, n);
    i0 += rows;
  }
}

template <class T, Access kAccess, int kVectors = kTileVectors>
void strip_of(int vectors, const Gemm<T>& g, int m, int v0, int n) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return strip_of<T, kAccess, kVectors - 1>(vectors, g, m, v0, n);
  }
  strip<T, kVectors, kAccess>(g, m, v0, n, std::make_integer_sequence<int, tile_rows(kVectors, kAccess)>());
}

template <class T, Access kAccess>
void gemm(const Gemm<T>& g, int m, int n, int vectors) {
  const int count = (vectors + kTileVectors - 1) / kTileVectors;
  for (int u = 0, v0 = 0; u < count; ++u) {
    const int wide = (vectors - v0) / (count - u);
    strip_of<T, kAccess>(wide, g, m, v0, n);
    v0 += wide;
  }
}

}  // namespace

template <class T>
void gemm_rows(const Gemm<T>& g, int m, int n, int vectors) {
  if (g.a_rows) return gemm<T, kAddresses>(g, m, n, vectors);
  gemm<T, kRows>(g, m, n, vectors);
}
template <class T>
void gemm_columns(const Gemm<T>& g, int m, int n, int vectors) {
  gemm<T, kColumns>(g, m, n, vectors);
}

template void gemm_rows<float>(const Gemm<float>&, int, int, int);
template void gemm_rows<double>(const Gemm<double>&, int, int, int);
template void gemm_columns<float>(const Gemm<float>&, int, int, int);
template void gemm_columns<double>(const Gemm<double>&, int, int, int);

}  // namespace vicinal::VICINAL_ISA
