// The feature maps of linear.h, value and derivative, once for host and device. X is float, double or a
// vector of them, T its element, and exp2 acts on X.
#pragma once
#include "linear.h"
#include "philox.h"  // VICINAL_HD

namespace vicinal {

template <FeatureMap kMap, class X, class T, class Exp2>
VICINAL_HD X feature(X x, T param, Exp2 exp2) {
  constexpr T log2e = T(1.44269504088896340736);
  const X zero = {};
  if constexpr (kMap == kMapElu1) {
    const X power = exp2((x < zero ? x : zero) * log2e);
    return x < zero ? power : x + T(1);
  } else if constexpr (kMap == kMapRelu) {
    return (x < zero ? zero : x) + param;
  } else if constexpr (kMap == kMapRelu2) {
    const X positive = x < zero ? zero : x;
    return positive * positive;
  } else if constexpr (kMap == kMapExp) {
    const X y = x - param, most = zero + T(kMostExponent);
    return exp2((y > most ? most : y) * log2e);
  } else {
    return x;
  }
}

template <FeatureMap kMap, class X, class T>
VICINAL_HD X feature_slope(X x, X value, T param) {
  const X zero = {}, one = zero + T(1);
  if constexpr (kMap == kMapElu1) {
    return x < zero ? value : one;
  } else if constexpr (kMap == kMapRelu) {
    return x > zero ? one : zero;
  } else if constexpr (kMap == kMapRelu2) {
    return x > zero ? x + x : zero;
  } else if constexpr (kMap == kMapExp) {
    return x - param > zero + T(kMostExponent) ? zero : value;
  } else {
    return one;
  }
}

}  // namespace vicinal
