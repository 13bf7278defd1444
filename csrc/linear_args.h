// One flat Python tuple -> the structs of linear.h. The order is that of the struct members, `Strided` is
// (data, stride_b, stride_n, stride_h, stride_d), a pointer is an int (0: null). After them comes what the
// launcher takes besides (cpu: threads).
#pragma once
#include "linear.h"
#include "module_args.h"

namespace vicinal {

inline Strided read_strided(TupleReader& t) {
  Strided x;
  x.data = t.pointer(), x.stride_b = t.integer(), x.stride_n = t.integer(), x.stride_h = t.integer();
  x.stride_d = t.integer();
  return x;
}

inline Linear read_linear(TupleReader& t) {
  Linear a;
  a.dtype = static_cast<DType>(t.small()), a.mask = static_cast<LinearMask>(t.small());
  a.map_q = static_cast<FeatureMap>(t.small()), a.map_k = static_cast<FeatureMap>(t.small());
  a.param_q = t.real(), a.param_k = t.real();
  a.batch = t.integer(), a.sequences = t.integer(), a.n_q = t.integer(), a.n_k = t.integer();
  a.heads = t.small(), a.heads_qk = t.small(), a.dim = t.small(), a.dim_v = t.small();
  a.dim_den = t.small();
  a.normalize = t.small(), a.scale = t.real(), a.eps = t.real(), a.constant = t.real();
  a.block_size = t.integer(), a.chunk_size = t.integer();
  a.q = read_strided(t), a.k = read_strided(t), a.v = read_strided(t);
  a.q_den = read_strided(t), a.k_den = read_strided(t);
  a.decay = t.pointer(), a.decay_stride_b = t.integer(), a.decay_stride_n = t.integer();
  a.decay_stride_h = t.integer();
  a.key_mask = static_cast<const uint8_t*>(t.pointer());
  a.cu_seqlens = static_cast<const int32_t*>(t.pointer());
  a.initial_s = t.pointer(), a.initial_z = t.pointer();
  return a;
}

inline LinearFwd read_linear_fwd(TupleReader& t) {
  LinearFwd p;
  p.a = read_linear(t);
  p.out = read_strided(t), p.den = t.pointer(), p.final_s = t.pointer(), p.final_z = t.pointer();
  return p;
}

inline LinearBwd read_linear_bwd(TupleReader& t) {
  LinearBwd p;
  p.a = read_linear(t);
  p.out = read_strided(t), p.dout = read_strided(t);
  p.den = t.pointer(), p.final_s = t.pointer(), p.final_z = t.pointer();
  p.dfinal_s = t.pointer(), p.dfinal_z = t.pointer();
  p.dq = read_strided(t), p.dk = read_strided(t), p.dv = read_strided(t);
  p.dq_den = read_strided(t), p.dk_den = read_strided(t);
  p.ddecay = t.pointer(), p.dinitial_s = t.pointer(), p.dinitial_z = t.pointer();
  return p;
}

inline LinearStep read_linear_step(TupleReader& t) {
  LinearStep p;
  p.a = read_linear(t);
  p.out = read_strided(t), p.s = t.pointer(), p.z = t.pointer();
  return p;
}

}  // namespace vicinal
