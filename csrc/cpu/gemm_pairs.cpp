// Tiles of pairs: those of gemm.cpp with VDPBF16PS for the multiply-add.
//
// Measured on Zen 5: 467 GF/s out of registers against 232 GF/s of float multiply-adds. It is slower than
// these on Sapphire Rapids, whose tiles (AMX) would need another layout.
#include "pairs.h"

namespace vicinal::VICINAL_ISA {
#if defined(__AVX512BF16__)
namespace {

enum Access { kRows, kAddresses, kColumns };

constexpr int tile_rows(int vectors) { return vectors < 3 ? 10 : 24 / vectors; }

inline __m512i pair_at(const void* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}

template <int kVectors, int kCount>
[[gnu::always_inline]] inline void store_rows(const PairGemm& g, int i0, int v0,
                                              Vec<float> (&acc)[kCount][kVectors]) {
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i) {
    const float factor = g.c_factor ? g.c_factor[i0 + i] : g.factor;
    const float* add = g.add ? g.add + (i0 + i) * g.add_stride + v0 * 16 : nullptr;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      acc[i][v] = acc[i][v] * factor + (add ? load(add + v * 16) : Vec<float>{});
    if (!g.c_rows) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(g.c + (i0 + i) * g.c_stride + (v0 + v) * 16, acc[i][v]);
      continue;
    }
    BFloat16* to = g.c_rows[i0 + i];
#pragma GCC unroll 4
    for (int v = 0; to && v < kVectors; ++v) {
      const int rest = g.c_width - (v0 + v) * 16;
      if (rest < 16) {
        store_part<float>(to + (v0 + v) * 16, acc[i][v], rest);
      } else {
        store_as(to + (v0 + v) * 16, acc[i][v]);
      }
    }
  }
}

template <int kVectors, int kCount, Access kAccess>
void tile(const PairGemm& g, int i0, int v0, int n) {
  Vec<float> acc[kCount][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[i][v] = Vec<float>{};
  }
  const BFloat16* a_row[kCount];
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i) a_row[i] = kAccess == kAddresses ? g.a_rows[i0 + i] : nullptr;
  const float *a = kAccess == kColumns ? g.a + i0 : g.a + i0 * g.a_stride, *b = g.b + v0 * 16;
  for (int t = 0; t < n; ++t) {
    Vec<float> bv[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) bv[v] = load(b + v * 16);
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) {
      const __m512i x = kAccess == kColumns ? pair_at(a + i)
                        : kAccess == kRows  ? pair_at(a + i * g.a_stride)
                                            : pair_at(a_row[i] + 2 * t);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        acc[i][v] = _mm512_dpbf16_ps(acc[i][v], (__m512bh)bv[v], (__m512bh)x);
    }
    a += kAccess == kColumns ? g.a_stride : 1;
    b += g.b_stride;
  }
  store_rows<kVectors, kCount>(g, i0, v0, acc);
}

template <int kVectors, Access kAccess, int... kCounts>
void strip(const PairGemm& g, int m, int v0, int n, std::integer_sequence<int, kCounts...>) {
  using Tile = void (*)(const PairGemm&, int, int, int);
  static constexpr Tile tiles[] = {&tile<kVectors, kCounts + 1, kAccess>...};
  constexpr int most = sizeof...(kCounts);
  const int count = (m + most - 1) / most;
  for (int u = 0, i0 = 0; u < count; ++u) {
    const int rows = (m - i0) / (count - u);
    if (g.ahead) g.ahead->step(g.ahead->context);
    tiles[rows - 1](g, i0, v0, n);
    i0 += rows;
  }
}

template <Access kAccess, int kVectors = kTileVectors>
void strip_of(int vectors, const PairGemm& g, int m, int v0, int n) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return strip_of<kAccess, kVectors - 1>(vectors, g, m, v0, n);
  }
  strip<kVectors, kAccess>(g, m, v0, n, std::make_integer_sequence<int, tile_rows(kVectors)>());
}

template <Access kAccess>
void gemm(const PairGemm& g, int m, int n, int vectors) {
  const int count = (vectors + kTileVectors - 1) / kTileVectors;
  for (int u = 0, v0 = 0; u < count; ++u) {
    const int wide = (vectors - v0) / (count - u);
    strip_of<kAccess>(wide, g, m, v0, n);
    v0 += wide;
  }
}

}  // namespace

void pair_rows(const PairGemm& g, int m, int n, int vectors) {
  if (g.a_rows) return gemm<kAddresses>(g, m, n, vectors);
  gemm<kRows>(g, m, n, vectors);
}
void pair_columns(const PairGemm& g, int m, int n, int vectors) { gemm<kColumns>(g, m, n, vectors); }
#endif
}  // namespace vicinal::VICINAL_ISA
