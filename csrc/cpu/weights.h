// Scores -> weights, for one vector of queries: elementwise functions of the activations.
#pragma once
#include "simd.h"

namespace vicinal::VICINAL_ISA {

// Weight of a score when there is no softmax; -inf is an excluded pair.
template <class T>
inline Vec<T> activate(Activation activation, Vec<T> s) {
  if (activation == kIdentity) return s == splat(-T(__builtin_inf())) ? Vec<T>{} : s;
  const Vec<T> positive = maximum(Vec<T>{}, s);
  return activation == kRelu ? positive : positive * positive;
}
// Its derivative.
template <class T>
inline Vec<T> slope(Activation activation, Vec<T> s) {
  if (activation == kIdentity) return s == splat(-T(__builtin_inf())) ? Vec<T>{} : splat(T(1));
  const Vec<T> zero = {}, rise = activation == kRelu ? splat(T(1)) : s + s;
  return s <= zero ? zero : rise;
}

}  // namespace vicinal::VICINAL_ISA
