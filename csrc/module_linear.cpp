// Bindings of the linear kernels of the CPU.
#include <pybind11/pybind11.h>

#include "cpu/dispatch.h"
#include "linear_args.h"

namespace py = pybind11;

namespace vicinal {
namespace {

template <class Params, Params (*kRead)(TupleReader&), void (*kLaunch)(const Params&, int)>
PyObject* launch(PyObject*, PyObject* arguments) {
  TupleReader t(arguments);
  const Params p = kRead(t);
  const int threads = t.small();
  if (!t.ok()) return nullptr;
  try {
    cpu::isa();  // a wrong VICINAL_CPU_ISA throws here, with the lock held
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_BEGIN_ALLOW_THREADS;
  kLaunch(p, threads);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"linear_fwd", launch<LinearFwd, read_linear_fwd, cpu::linear_fwd>, METH_O,
     "linear_fwd(arguments): csrc/linear_args.h has the order; the last one is the number of threads."},
    {"linear_bwd", launch<LinearBwd, read_linear_bwd, cpu::linear_bwd>, METH_O,
     "linear_bwd(arguments), likewise."},
    {"linear_step", launch<LinearStep, read_linear_step, cpu::linear_step>, METH_O,
     "linear_step(arguments), likewise."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_linear(py::module_& m) { PyModule_AddFunctions(m.ptr(), methods); }

}  // namespace vicinal
