// A CPU kernel as a Python function of one flat tuple: the kernel's struct, then the number of threads.
#pragma once
#include <exception>

#include "cpu/dispatch.h"
#include "module_args.h"

namespace vicinal {

// Plain C functions: pybind11's own calls would take longer than reading the whole tuple.
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

}  // namespace vicinal
