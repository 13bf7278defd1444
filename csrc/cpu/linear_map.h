// Feature maps of tiles.
#pragma once
#include "feature_map.h"
#include "linear_tile.h"

namespace vicinal::VICINAL_ISA {

struct Exp2 {
  template <class X>
  X operator()(X x) const {
    return exp2(x);
  }
};

template <class T>
inline Vec<T> first_lanes(int n) {  // 1 in the first n lanes, then 0
  Vec<T> x;
  for (int i = 0; i < kLanes<T>; ++i) x[i] = i < n ? T(1) : T(0);
  return x;
}

template <class T, FeatureMap kMap, bool kSlopes>
void map_rows(T param, T factor, T* tile, T* slopes, int n, int dim, int stride) {
  constexpr int kN = kLanes<T>;
  const Vec<T> last = first_lanes<T>(dim % kN);
  for (int i = 0; i < n; ++i) {
    for (int d = 0; d < dim; d += kN) {
      const int64_t at = int64_t(i) * stride + d;
      const Vec<T> x = load(tile + at), value = feature<kMap>(x, param, Exp2());
      const Vec<T> f = d + kN <= dim ? splat(factor) : last * factor;
      store(tile + at, value * f);
      if constexpr (kSlopes) store(slopes + at, feature_slope<kMap>(x, value, param) * f);
    }
  }
}

template <class T, bool kSlopes>
void map_any(FeatureMap map, T param, T factor, T* tile, T* slopes, int n, int dim, int stride) {
  switch (map) {
    case kMapElu1:
      return map_rows<T, kMapElu1, kSlopes>(param, factor, tile, slopes, n, dim, stride);
    case kMapRelu:
      return map_rows<T, kMapRelu, kSlopes>(param, factor, tile, slopes, n, dim, stride);
    case kMapRelu2:
      return map_rows<T, kMapRelu2, kSlopes>(param, factor, tile, slopes, n, dim, stride);
    case kMapExp:
      return map_rows<T, kMapExp, kSlopes>(param, factor, tile, slopes, n, dim, stride);
    case kMapIdentity:
      return map_rows<T, kMapIdentity, kSlopes>(param, factor, tile, slopes, n, dim, stride);
  }
}

// tile = factor * phi(tile) and, unless null, slopes = factor * phi'(tile); columns from dim on stay 0.
template <class T>
void map_tile(FeatureMap map, double param, double factor, T* tile, T* slopes, int n, int dim, int stride) {
  if (slopes) return map_any<T, true>(map, T(param), T(factor), tile, slopes, n, dim, stride);
  if (map == kMapIdentity && factor == 1.0) return;
  map_any<T, false>(map, T(param), T(factor), tile, nullptr, n, dim, stride);
}

}  // namespace vicinal::VICINAL_ISA
