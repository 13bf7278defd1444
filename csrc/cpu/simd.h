// Vectors of the instruction set that this file is compiled for: GCC's vector extension, which gives the
// arithmetic of every machine, and intrinsics for what it cannot say. Everything lies in the namespace of the
// instruction set.
#pragma once
#include <type_traits>
#include <utility>

#include "scalar.h"
#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace vicinal::VICINAL_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
  typedef float Loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLogLanes = kVectorBytes == 64 ? 4 : kVectorBytes == 32 ? 3 : 2;
  static constexpr int kMantissa = 23;
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
  typedef double Loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Ints __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLogLanes = VectorOf<float>::kLogLanes - 1;
  static constexpr int kMantissa = 52;
};

template <class T>
using Vec = typename VectorOf<T>::Type;
template <class T>
using Ints = typename VectorOf<T>::Ints;
template <class T>
using Bits = typename VectorOf<T>::Bits;
template <class T>
constexpr int kLanes = 1 << VectorOf<T>::kLogLanes;

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::Loose*>(p);
}
template <class T>
inline void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename VectorOf<T>::Loose*>(p) = x;
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}
// The second argument where either one is NaN.
template <class V>
inline V maximum(V a, V b) {
  return a > b ? a : b;
}
#if defined(__AVX2__) && !defined(__AVX512F__)  // one instruction, where GCC makes two of the comparison
inline Vec<float> maximum(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
inline Vec<double> maximum(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a, b); }
#endif

template <class T>
constexpr int round_up(T n, int to) {
  return static_cast<int>((n + to - 1) / to * to);
}

// Minimax polynomials of 2^f that are 1 at 0: float on [0, 1] (relative error 8.2e-8), double on [-0.5, 0.5]
// (3e-18).
inline Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = f * 1.8671299794e-03f + 9.0170305283e-03f;
  p = p * f + 5.5799912947e-02f;
  p = p * f + 2.4016445020e-01f;
  p = p * f + 6.9315131180e-01f;
  return p * f + 1.0f;
}
inline Vec<double> exp2_fraction(Vec<double> f) {
  constexpr double c[] = {4.43528094461033628849e-10, 7.07410562624565907890e-09, 1.01781980333285281111e-07,
                          1.32154330895946296162e-06, 1.52527334899608050633e-05, 1.54035304625146137608e-04,
                          1.33335581467899509829e-03, 9.61812910758833537750e-03, 5.55041086648199247233e-02,
                          2.40226506959101554495e-01, 6.93147180559945286227e-01, 1.0};
  Vec<double> p = splat(c[0]);
#pragma GCC unroll 12
  for (int i = 1; i < 12; ++i) p = p * f + c[i];
  return p;
}

// 2^x for x below 100, -inf and NaN included.
#if defined(__AVX512F__)
inline Vec<float> exp2(Vec<float> x) {
  return _mm512_scalef_ps(exp2_fraction(_mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF)), x);
}
inline Vec<double> exp2(Vec<double> x) {
  const Vec<double> f = _mm512_reduce_pd(x, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_scalef_pd(exp2_fraction(f), x - f);
}
#else
template <class V, class T = std::conditional_t<sizeof(V{}[0]) == 4, float, double>>
inline V exp2(V x) {
  constexpr T magic = sizeof(T) == 4 ? T(0x1.8p23) : T(0x1.8p52);  // adding it rounds to an integer
  constexpr T low = sizeof(T) == 4 ? T(-126.75) : T(-1023);        // rounds to an exponent whose power is 0
  constexpr T down = sizeof(T) == 4 ? T(0.5) : T(0);               // floor for float, nearest for double
  constexpr uint64_t bias = sizeof(T) == 4 ? 127 : 1023;
  const V y = maximum(splat(low), x);
  const V shifted = (y - down) + magic, f = y - (shifted - magic);
  return exp2_fraction(f) * (V)(((Bits<T>)shifted + bias) << VectorOf<T>::kMantissa);
}
#endif

// log2 of 0, positive normal numbers, infinity and NaN: 2 / ln 2 * atanh((m - 1) / (m + 1)) of the mantissa
// m.
template <class V, class T = std::conditional_t<sizeof(V{}[0]) == 4, float, double>>
inline V log2(V x) {
  constexpr int mantissa = VectorOf<T>::kMantissa;
  constexpr uint64_t half_root = sizeof(T) == 4 ? 0x3f3504f3 : 0x3fe6a09e667f3bcd;  // bits of sqrt(1 / 2)
  const Bits<T> bits = (Bits<T>)x;
  const Ints<T> exponent = (Ints<T>)(bits - half_root) >> mantissa;
  const V m = (V)(bits - ((Bits<T>)exponent << mantissa));
  const Vec<T> s = (m - T(1)) / (m + T(1)), z = s * s;
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;
  Vec<T> sum = splat(T(1) / (2 * terms + 1));
  for (int i = terms - 1; i >= 0; --i) sum = sum * z + T(1) / (2 * i + 1);
  const Vec<T> value = __builtin_convertvector(exponent, Vec<T>) + s * sum * T(2.88539008177792681472);
  const Vec<T> infinite = splat(T(__builtin_inf()));
  const Vec<T> finite = x == Vec<T>{} ? -infinite : value;
  return x < infinite ? finite : x;
}

template <class V, int... I>
inline V interleave_low(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * n)...);
}
template <class V, int... I>
inline V interleave_high(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I + n) / 2 + I % 2 * n)...);
}

// A square of kLanes<T> vectors, transposed in place: each stage rotates the bits of (row, lane) by one.
template <class T>
inline void transpose(Vec<T>* r) {
  constexpr int n = kLanes<T>;
  using Sequence = std::make_integer_sequence<int, n>;
#pragma GCC unroll 4
  for (int stage = 0; stage < VectorOf<T>::kLogLanes; ++stage) {
    Vec<T> t[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      t[2 * i] = interleave_low(r[i], r[i + n / 2], Sequence());
      t[2 * i + 1] = interleave_high(r[i], r[i + n / 2], Sequence());
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) r[i] = t[i];
  }
}

// Lane i of the result is the sum of the lanes of r[i].
template <class T>
inline Vec<T> sum_each(Vec<T>* r) {
  using Sequence = std::make_integer_sequence<int, kLanes<T>>;
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half >= 1; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      r[i] = interleave_low(r[i], r[i + half], Sequence()) + interleave_high(r[i], r[i + half], Sequence());
    }
  }
  return r[0];
}
template <class T>
inline T sum_lanes(Vec<T> x) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += x[i];
  return sum;
}

// kLanes<T> elements of S <-> Vec<T>.
inline Vec<float> load_as(const float* p) { return load(p); }
inline Vec<double> load_as(const double* p) { return load(p); }
inline Vec<float> load_as(const BFloat16* p) {
  typedef uint16_t Short __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint16_t Loose __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  const Short bits = *reinterpret_cast<const Loose*>(p);
  return (Vec<float>)(__builtin_convertvector(bits, Wide) << 16);
}
inline Vec<float> load_as(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = widen(p[i]);
  return x;
#endif
}

inline void store_as(float* p, Vec<float> x) { store(p, x); }
inline void store_as(double* p, Vec<double> x) { store(p, x); }
inline void store_as(BFloat16* p, Vec<float> x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
#else
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Short __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint16_t Loose __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  const Wide bits = (Wide)x;
  const Wide rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, quiet = bits >> 16 | 0x40u;
  const Wide chosen = x != x ? quiet : rounded;
  *reinterpret_cast<Loose*>(p) = __builtin_convertvector(chosen, Short);
#endif
}
inline void store_as(Half* p, Vec<float> x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) narrow(x[i], p + i);
#endif
}

// The first n < kLanes<T> elements; the other lanes are 0, their memory is not touched.
template <class T, class S>
inline Vec<T> load_part(const S* p, int n) {
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1u;
  if constexpr (sizeof(S) == 4) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  } else if constexpr (sizeof(S) == 8) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
  } else {
    S buffer[16];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer),
                        _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
    return load_as(buffer);
  }
#else
  S buffer[kLanes<T>] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load_as(buffer);
#endif
}
template <class T, class S>
inline void store_part(S* p, Vec<T> x, int n) {
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1u;
  if constexpr (sizeof(S) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), x);
  } else if constexpr (sizeof(S) == 8) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), x);
  } else {
    S buffer[16];
    store_as(buffer, x);
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask),
                             _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer)));
  }
#else
  S buffer[kLanes<T>];
  store_as(buffer, x);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

}  // namespace vicinal::VICINAL_ISA
