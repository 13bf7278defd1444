// Feature maps: value and derivative, once.
#pragma once
#include "linear_tile.h"

namespace vicinal::VICINAL_ISA {

template <class T, FeatureMap kMap>
inline Vec<T> phi(Vec<T> x, T param) {
  constexpr T log2e = T(1.44269504088896340736);
  const Vec<T> zero = {};
  if constexpr (kMap == kMapElu1) {
    const Vec<T> power = exp2((x < zero ? x : zero) * log2e);
    return x < zero ? power : x + T(1);
  } else if constexpr (kMap == kMapRelu) {
    return (x < zero ? zero : x) + param;
  } else if constexpr (kMap == kMapRelu2) {
    const Vec<T> positive = x < zero ? zero : x;
    return positive * positive;
  } else if constexpr (kMap == kMapExp) {
    const Vec<T> y = x - param, most = splat(T(kMostExponent));
    return exp2((y > most ? most : y) * log2e);
  } else {
    return x;
  }
}

template <class T, FeatureMap kMap>
inline Vec<T> phi_slope(Vec<T> x, Vec<T> value, T param) {
  const Vec<T> zero = {}, one = splat(T(1));
  if constexpr (kMap == kMapElu1) {
    return x < zero ? value : one;
  } else if constexpr (kMap == kMapRelu) {
    return x > zero ? one : zero;
  } else if constexpr (kMap == kMapRelu2) {
    return x > zero ? x + x : zero;
  } else if constexpr (kMap == kMapExp) {
    return x - param > splat(T(kMostExponent)) ? zero : value;
  } else {
    return one;
  }
}

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
      const Vec<T> x = load(tile + at), value = phi<T, kMap>(x, param);
      const Vec<T> f = d + kN <= dim ? splat(factor) : last * factor;
      store(tile + at, value * f);
      if constexpr (kSlopes) store(slopes + at, phi_slope<T, kMap>(x, value, param) * f);
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
