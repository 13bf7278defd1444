// Bindings of context attention. A tuple starts with a Context, in the order of its members, `Rows` being
// (data, stride_b, stride_n, stride_h) and the plan as in module_args.h; then come the members of ContextFwd
// or ContextBwd, and the number of threads.
#include <pybind11/pybind11.h>

#include "context.h"
#include "module_launch.h"

namespace py = pybind11;

namespace vicinal {
namespace {

Context read_context(TupleReader& t) {
  Context a;
  a.dtype = static_cast<DType>(t.small());
  a.heads = t.small(), a.head_dim = t.small(), a.head_dim_v = t.small();
  a.n_q = t.integer(), a.n_k = t.integer();
  a.q = t.rows(), a.k = t.rows(), a.v = t.rows();
  a.plan = read_plan(t);
  a.scale = t.real(), a.key_bias = t.pointer();
  a.q_cells = static_cast<const int32_t*>(t.pointer()), a.k_cells = static_cast<const int32_t*>(t.pointer());
  a.offsets = t.small(), a.width = t.small(), a.width_v = t.small(), a.tables = t.pointer();
  return a;
}

ContextFwd read_context_fwd(TupleReader& t) {
  ContextFwd p;
  p.a = read_context(t);
  p.out = t.rows(), p.lse = t.pointer(), p.lse_stride_n = t.integer();
  return p;
}

ContextBwd read_context_bwd(TupleReader& t) {
  ContextBwd p;
  p.a = read_context(t);
  p.dout = t.rows(), p.lse = t.pointer(), p.dlse = t.pointer(), p.lse_stride_n = t.integer();
  p.dq = t.rows(), p.dk = t.rows(), p.dv = t.rows(), p.dtables = t.pointer();
  return p;
}

PyMethodDef methods[] = {
    {"context_fwd", launch<ContextFwd, read_context_fwd, cpu::context_fwd>, METH_O,
     "context_fwd(arguments): csrc/context.h has the order; the last one is the number of threads."},
    {"context_bwd", launch<ContextBwd, read_context_bwd, cpu::context_bwd>, METH_O,
     "context_bwd(arguments): csrc/context.h has the order; the last one is the number of threads."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_context(py::module_& m) { PyModule_AddFunctions(m.ptr(), methods); }

}  // namespace vicinal
