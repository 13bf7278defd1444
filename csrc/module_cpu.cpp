// Bindings of the CPU kernels, and of the pairwise facts for tests.
#include <pybind11/pybind11.h>

#include <cstring>

#include "cpu/dispatch.h"
#include "module_args.h"
#include "module_launch.h"
#include "pattern.h"

namespace py = pybind11;

namespace vicinal {
namespace {

// A launch whose tensors have the same shapes and strides as an earlier one: the bytes of its struct, and the
// pointers that differ.
template <class Params, Params (*kRead)(TupleReader&)>
PyObject* remember(PyObject*, PyObject* arguments) {
  TupleReader t(arguments);
  const Params p = kRead(t);
  if (!t.ok()) return nullptr;
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&p), sizeof p);
}

void set_pointers(AttendFwd& p, void* const* x) {
  p.a.q.data = x[0], p.a.k.data = x[1], p.a.v.data = x[2], p.a.bias = x[3], p.out.data = x[4], p.lse = x[5];
}

void set_pointers(AttendBwd& p, void* const* x) {
  p.a.q.data = x[0], p.a.k.data = x[1], p.a.v.data = x[2], p.a.bias = x[3], p.out.data = x[4], p.lse = x[5];
  p.dout.data = x[6], p.dlse = x[7], p.dq.data = x[8], p.dk.data = x[9], p.dv.data = x[10], p.dbias = x[11];
}

template <class Params, int kPointers, void (*kLaunch)(const Params&, int)>
PyObject* launch_again(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kPointers + 2 || !PyBytes_Check(args[0]) || PyBytes_GET_SIZE(args[0]) != sizeof(Params)) {
    PyErr_Format(PyExc_TypeError, "expected a remembered launch, %d pointers and a thread count", kPointers);
    return nullptr;
  }
  Params p;
  std::memcpy(&p, PyBytes_AS_STRING(args[0]), sizeof p);
  void* pointers[kPointers];
  for (int i = 0; i < kPointers; ++i) {
    pointers[i] = reinterpret_cast<void*>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(args[i + 1])));
  }
  const int threads = static_cast<int>(PyLong_AsLong(args[kPointers + 1]));
  if (PyErr_Occurred()) return nullptr;
  set_pointers(p, pointers);
  Py_BEGIN_ALLOW_THREADS;
  kLaunch(p, threads);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

template <class Params, int kPointers, void (*kLaunch)(const Params&, int)>
PyCFunction fastcall() {
  return reinterpret_cast<PyCFunction>(
      reinterpret_cast<void (*)()>(launch_again<Params, kPointers, kLaunch>));
}

PyMethodDef methods[] = {
    {"remember_fwd", remember<AttendFwd, read_attend_fwd>, METH_O,
     "A forward launch as bytes, without threads."},
    {"remember_bwd", remember<AttendBwd, read_attend_bwd>, METH_O, "A backward launch as bytes, likewise."},
    {"attend_fwd_again", fastcall<AttendFwd, 6, cpu::attend_fwd>(), METH_FASTCALL,
     "attend_fwd_again(remembered, q, k, v, bias, out, lse, threads)"},
    {"attend_bwd_again", fastcall<AttendBwd, 12, cpu::attend_bwd>(), METH_FASTCALL,
     "attend_bwd_again(remembered, q, k, v, bias, out, lse, dout, dlse, dq, dk, dv, dbias, threads)"},
    {"attend_fwd", launch<AttendFwd, read_attend_fwd, cpu::attend_fwd>, METH_O,
     "attend_fwd(arguments): csrc/module_args.h has the order; the last one is the number of threads."},
    {"attend_bwd", launch<AttendBwd, read_attend_bwd, cpu::attend_bwd>, METH_O,
     "attend_bwd(arguments): csrc/module_args.h has the order; the last one is the number of threads."},
    {nullptr, nullptr, 0, nullptr}};

// [(token, region, code, coord)] of every slot of a box.
py::list slot_entries(uintptr_t axes, py::sequence begin, py::sequence extent) {
  int32_t b[3], e[3];
  for (int i = 0; i < 3; ++i) b[i] = begin[i].cast<int32_t>(), e[i] = extent[i].cast<int32_t>();
  py::list entries;
  for (int32_t slot = 0; slot < e[0] * e[1] * e[2]; ++slot) {
    const AxisEntry x = slot_entry(reinterpret_cast<const AxisEntry*>(axes), b, e, slot);
    entries.append(py::make_tuple(x.token, x.region, x.code, x.coord));
  }
  return entries;
}

py::tuple philox_words(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  const Philox4 w = philox(seed, c0, c1, c2, c3);
  return py::make_tuple(w.x[0], w.x[1], w.x[2], w.x[3]);
}

}  // namespace

void bind_cpu(py::module_& m) {
  PyModule_AddFunctions(m.ptr(), methods);
  m.def("isa", &cpu::isa, "The instruction set in use.");
  m.def("available_isas", [] { return py::str(cpu::available_isas()).attr("split")(); });
  m.def("set_isa", &cpu::set_isa, py::arg("name"), "Choose an instruction set; '' goes back to the default.");
  m.def("fma_probe", &cpu::fma_probe, py::arg("seconds"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(),
        "float32 GFLOP/s of multiply-adds out of registers: the ceiling that benchmarks compare with.");
  m.def("slot_entries", &slot_entries, py::arg("axes"), py::arg("begin"), py::arg("extent"));
  m.def("bias_index", &bias_index);
  m.def("crosses", &crosses);
  m.def("visible", &visible);
  m.def("philox", &philox_words);
  m.def("dropout_threshold", &dropout_threshold);
}

}  // namespace vicinal
