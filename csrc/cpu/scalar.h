// Scalar loads, stores and conversions of the four dtypes.
#pragma once
#include <cstdint>
#include <cstring>

#include "attend.h"

namespace vicinal::VICINAL_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // A product with 2^112 moves the exponent and normalises subnormals.
  return as_float(sign | as_bits(as_float(rest << 13) * 0x1p112f));
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, BFloat16* to) {
  const uint32_t bits = as_bits(x);
  if (x != x) {
    to->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
  } else {
    to->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}
inline void narrow(float x, Half* to) {
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // rounds above the largest half
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // subnormal: adding 0.5 rounds to multiples of 2^-24
    half = as_bits(as_float(rest) + 0.5f) - as_bits(0.5f);
  } else {
    half = (rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

template <class S>
S* row_of(const Rows& t, int64_t b, int64_t n, int64_t h) {
  return static_cast<S*>(t.data) + b * t.stride_b + n * t.stride_n + h * t.stride_h;
}

}  // namespace vicinal::VICINAL_ISA
