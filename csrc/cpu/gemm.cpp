// Register tiles of tile_rows(vectors) x vectors accumulators: 88-98% of the FMA rate on operands in the
// first-level cache.
//
// bfloat16 and half are packed to float before: with that, 16 x 16 windows of bfloat16 run at 60% of the
// float FMA rate. VDPBF16PS (twice the FMA rate on Zen 5, slower than FMA on Sapphire Rapids) would need
// pairs of steps interleaved in both operands and weights rounded to bfloat16; AMX tiles likewise. Neither is
// written. They fit behind gemm_rows and gemm_columns, whose callers know nothing of the tiles.
#include "gemm.h"

namespace vicinal::VICINAL_ISA {
namespace {

// Rows that leave registers for the vectors of B and a broadcast.
constexpr int tile_rows(int vectors) {
#if defined(__AVX512F__)
  return vectors == 1 ? 12 : 24 / vectors;
#elif defined(__AVX2__)
  return vectors == 1 ? 8 : 12 / vectors;
#else
  return vectors == 1 ? 6 : 4;
#endif
}

template <class T, int kVectors, int kRows, bool kColumns>
void tile(const Gemm<T>& g, int i0, int v0, int n) {
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[kRows][kVectors];
  const T* init = g.init ? g.init + i0 * g.init_stride + v0 * lanes : nullptr;
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      acc[i][v] = init ? load(init + i * g.init_stride + v * lanes) : Vec<T>{};
  }
  const T* a_row[kRows];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    if (kColumns) {
      a_row[i] = g.a + i0 + i;
    } else {
      a_row[i] = g.a_rows ? g.a_rows[i0 + i] : g.a + (i0 + i) * g.a_stride;
    }
  }
  for (int t = 0; t < n; ++t) {
    const T* b = (g.b_rows ? g.b_rows[t] : g.b + t * g.b_stride) + v0 * lanes;
    Vec<T> bv[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) bv[v] = load(b + v * lanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const T x = kColumns ? a_row[0][t * g.a_stride + i] : a_row[i][t];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] += bv[v] * x;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    T* c = (g.c_rows ? g.c_rows[i0 + i] : g.c + (i0 + i) * g.c_stride) + v0 * lanes;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (g.c_factor) acc[i][v] *= g.c_factor[i0 + i];
      store(c + v * lanes, acc[i][v]);
    }
  }
}

template <class T, int kVectors, bool kColumns, int... kRows>
void strip(const Gemm<T>& g, int m, int v0, int n, std::integer_sequence<int, kRows...>) {
  using Tile = void (*)(const Gemm<T>&, int, int, int);
  static constexpr Tile tiles[] = {&tile<T, kVectors, kRows + 1, kColumns>...};
  constexpr int most = sizeof...(kRows);
  const int count = (m + most - 1) / most;
  for (int u = 0, i0 = 0; u < count; ++u) {  // as even as possible
    const int rows = (m - i0) / (count - u);
    if (g.ahead) g.ahead->step(g.ahead->context);
    tiles[rows - 1](g, i0, v0, n);
    i0 += rows;
  }
}

template <class T, bool kColumns, int kVectors = kTileVectors>
void strip_of(int vectors, const Gemm<T>& g, int m, int v0, int n) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return strip_of<T, kColumns, kVectors - 1>(vectors, g, m, v0, n);
  }
  strip<T, kVectors, kColumns>(g, m, v0, n, std::make_integer_sequence<int, tile_rows(kVectors)>());
}

template <class T, bool kColumns>
void gemm(const Gemm<T>& g, int m, int n, int vectors) {
  const int count = (vectors + kTileVectors - 1) / kTileVectors;
  for (int u = 0, v0 = 0; u < count; ++u) {
    const int wide = (vectors - v0) / (count - u);
    strip_of<T, kColumns>(wide, g, m, v0, n);
    v0 += wide;
  }
}

}  // namespace

template <class T>
void gemm_rows(const Gemm<T>& g, int m, int n, int vectors) {
  gemm<T, false>(g, m, n, vectors);
}
template <class T>
void gemm_columns(const Gemm<T>& g, int m, int n, int vectors) {
  gemm<T, true>(g, m, n, vectors);
}

template void gemm_rows<float>(const Gemm<float>&, int, int, int);
template void gemm_rows<double>(const Gemm<double>&, int, int, int);
template void gemm_columns<float>(const Gemm<float>&, int, int, int);
template void gemm_columns<double>(const Gemm<double>&, int, int, int);

}  // namespace vicinal::VICINAL_ISA
