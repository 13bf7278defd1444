// Bindings of joint attention. A tuple starts with a Joint, in the order of its members, a Matrix being
// (data, stride_b, stride_n); then come the members of JointFwd or JointBwd, and the number of threads.
#include <pybind11/pybind11.h>

#include "joint.h"
#include "module_launch.h"

namespace py = pybind11;

namespace vicinal {
namespace {

Matrix read_matrix(TupleReader& t) {
  Matrix m;
  m.data = t.pointer(), m.stride_b = t.integer(), m.stride_n = t.integer();
  return m;
}

Joint read_joint(TupleReader& t) {
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

JointFwd read_joint_fwd(TupleReader& t) {
  JointFwd p;
  p.a = read_joint(t);
  p.out = read_matrix(t), p.other = read_matrix(t), p.inner_v = read_matrix(t), p.inner_u = read_matrix(t);
  p.state = t.pointer();
  return p;
}

JointBwd read_joint_bwd(TupleReader& t) {
  JointBwd p;
  p.a = read_joint(t);
  p.inner_v = read_matrix(t), p.inner_u = read_matrix(t), p.dout = read_matrix(t), p.dother = read_matrix(t);
  p.state = t.pointer(), p.dstate = t.pointer();
  p.dquad_q = read_matrix(t), p.dquad_k = read_matrix(t), p.dlin_q = read_matrix(t),
  p.dlin_k = read_matrix(t);
  p.dv = read_matrix(t), p.du = read_matrix(t), p.dbias = t.pointer();
  return p;
}

PyMethodDef methods[] = {
    {"joint_fwd", launch<JointFwd, read_joint_fwd, cpu::joint_fwd>, METH_O,
     "joint_fwd(arguments): csrc/joint.h has the order; the last one is the number of threads."},
    {"joint_bwd", launch<JointBwd, read_joint_bwd, cpu::joint_bwd>, METH_O,
     "joint_bwd(arguments): csrc/joint.h has the order; the last one is the number of threads."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_joint(py::module_& m) { PyModule_AddFunctions(m.ptr(), methods); }

}  // namespace vicinal
