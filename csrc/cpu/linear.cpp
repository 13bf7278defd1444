// The entry points of linear attention: by dtype and mask.
#include "linear_kernels.h"

namespace vicinal::VICINAL_ISA {
namespace {

template <class S, class T>
void forward(const LinearFwd& p, int threads) {
  const Linear& a = p.a;
  if (a.mask == kMaskFull) {
    full_fwd<S, T>(p, threads);
  } else if (a.mask == kMaskCausal) {
    causal_fwd<S, T>(p, threads);
  } else {
    blocks_fwd<S, T>(p, threads);
  }
  clear_rest<S>(a, p.out, a.n_q, a.heads, a.dim_v);
  if (!a.cu_seqlens || !a.normalize) return;
  for (int32_t h = 0; h < a.heads; ++h) {
    for (int64_t i = a.cu_seqlens[a.sequences]; i < a.n_q; ++i) static_cast<T*>(p.den)[h * a.n_q + i] = 1;
  }
}

template <class S, class T>
void backward(const LinearBwd& p, int threads) {
  const Linear& a = p.a;
  if (a.mask == kMaskFull) {
    full_bwd<S, T>(p, threads);
  } else if (a.mask == kMaskCausal) {
    causal_bwd<S, T>(p, threads);
  } else {
    blocks_bwd<S, T>(p, threads);
  }
  clear_rest<S>(a, p.dq, a.n_q, a.heads_qk, a.dim);
  clear_rest<S>(a, p.dk, a.n_k, a.heads_qk, a.dim);
  clear_rest<S>(a, p.dv, a.n_k, a.heads, a.dim_v);
  clear_rest<S>(a, p.dq_den, a.n_q, a.heads_qk, a.dim_den);
  clear_rest<S>(a, p.dk_den, a.n_k, a.heads_qk, a.dim_den);
  if (!a.cu_seqlens || !p.ddecay) return;
  T* ddecay = static_cast<T*>(p.ddecay);
  for (int64_t i = a.cu_seqlens[a.sequences] * int64_t(a.heads); i < a.n_k * a.heads; ++i) ddecay[i] = 0;
}

}  // namespace

#define FOR_DTYPE(function)                         \
  switch (p.a.dtype) {                              \
    case kF32:                                      \
      return function<float, float>(p, threads);    \
    case kF64:                                      \
      return function<double, double>(p, threads);  \
    case kBF16:                                     \
      return function<BFloat16, float>(p, threads); \
    case kF16:                                      \
      return function<Half, float>(p, threads);     \
  }

void linear_fwd(const LinearFwd& p, int threads) { FOR_DTYPE(forward) }
void linear_bwd(const LinearBwd& p, int threads) { FOR_DTYPE(backward) }

}  // namespace vicinal::VICINAL_ISA
