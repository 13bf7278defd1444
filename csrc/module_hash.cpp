// Bindings of hash attention. A tuple starts with a Hash, in the order of its members, `Rows` being (data,
// stride_b, stride_n, stride_h); then come the members of HashFwd or HashBwd, and the number of threads.
#include <pybind11/pybind11.h>

#include "hash.h"
#include "module_launch.h"

namespace py = pybind11;

namespace vicinal {
namespace {

Hash read_hash(TupleReader& t) {
  Hash a;
  a.dtype = static_cast<DType>(t.small()), a.batch = t.integer(), a.n = t.integer();
  a.heads = t.small(), a.dim = t.small(), a.dim_v = t.small(), a.anchors = t.small(), a.bits = t.small();
  a.self = t.small(), a.offset = t.real();
  a.qk = t.rows(), a.v = t.rows();
  a.anchor = t.pointer(), a.weight = t.pointer(), a.mean = t.pointer();
  return a;
}

HashFwd read_hash_fwd(TupleReader& t) {
  HashFwd p;
  p.a = read_hash(t);
  p.out = t.rows(), p.codes = static_cast<int32_t*>(t.pointer()), p.state = t.pointer();
  return p;
}

HashBwd read_hash_bwd(TupleReader& t) {
  HashBwd p;
  p.a = read_hash(t);
  p.dout = t.rows(), p.dqk = t.rows(), p.dv = t.rows();
  p.codes = static_cast<const int32_t*>(t.pointer()), p.state = t.pointer();
  return p;
}

PyMethodDef methods[] = {
    {"hash_fwd", launch<HashFwd, read_hash_fwd, cpu::hash_fwd>, METH_O,
     "hash_fwd(arguments): csrc/hash.h has the order; the last one is the number of threads."},
    {"hash_bwd", launch<HashBwd, read_hash_bwd, cpu::hash_bwd>, METH_O,
     "hash_bwd(arguments): csrc/hash.h has the order; the last one is the number of threads."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_hash(py::module_& m) { PyModule_AddFunctions(m.ptr(), methods); }

}  // namespace vicinal
