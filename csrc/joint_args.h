// One flat Python tuple -> the structs of joint.h, in the order of their members; a Matrix is (data,
// stride_b, stride_n). After them comes what the launcher takes besides (cpu: threads).
#pragma once
#include "joint.h"
#include "module_args.h"

namespace vicinal {

inline Matrix read_matrix(TupleReader& t) {
  Matrix m;
  m.data = t.pointer(), m.stride_b = t.integer(), m.stride_n = t.integer();
  return m;
}

inline Joint read_joint(TupleReader& t) {
  Joint a;
  a.dtype = static_cast<DType>(t.small()), a.activation = static_cast<JointActivation>(t.small());
  a.batch = t.integer(), a.n = t.integer(), a.group = t.integer();
  a.dim = t.small(), a.dim_v = t.small(), a.causal = t.small(), a.gate = t.small();
  a.quad_q = read_matrix(t), a.quad_k = read_matrix(t), a.lin_q = read_matrix(t), a.lin_k = read_matrix(t);
  a.v = read_matrix(t), a.u = read_matrix(t);
  a.quad_scale = t.real(), a.lin_scale = t.real(), a.dropout_p = t.real();
  a.bias = t.pointer(), a.ignored = static_cast<const uint8_t*>(t.pointer());
  a.seed = static_cast<const int64_t*>(t.pointer());
  return a;
}

inline JointFwd read_joint_fwd(TupleReader& t) {
  JointFwd p;
  p.a = read_joint(t);
  p.out = read_matrix(t), p.other = read_matrix(t), p.inner_v = read_matrix(t), p.inner_u = read_matrix(t);
  p.state = t.pointer();
  return p;
}

inline JointBwd read_joint_bwd(TupleReader& t) {
  JointBwd p;
  p.a = read_joint(t);
  p.inner_v = read_matrix(t), p.inner_u = read_matrix(t), p.dout = read_matrix(t), p.dother = read_matrix(t);
  p.state = t.pointer(), p.dstate = t.pointer();
  p.dquad_q = read_matrix(t), p.dquad_k = read_matrix(t), p.dlin_q = read_matrix(t),
  p.dlin_k = read_matrix(t);
  p.dv = read_matrix(t), p.du = read_matrix(t), p.dbias = t.pointer();
  return p;
}

}  // namespace vicinal
