// A CUDA kernel as a Python function of one flat tuple: the kernel's struct, then its workspace if it has
// one, then the handle of a stream.
#pragma once
#include "module_args.h"

namespace vicinal {

inline PyObject* checked(int error) {
  if (!error) Py_RETURN_NONE;
  return PyErr_Format(PyExc_RuntimeError, "CUDA error %d: %s", error, cuda::error_text(error));
}

template <class Params, Params (*kRead)(TupleReader&), int (*kLaunch)(const Params&, void*)>
PyObject* cuda_launch(PyObject*, PyObject* arguments) {
  TupleReader t(arguments);
  const Params p = kRead(t);
  void* stream = t.pointer();
  return t.ok() ? checked(kLaunch(p, stream)) : nullptr;
}

template <class Params, Params (*kRead)(TupleReader&), int64_t (*kBytes)(const Params&)>
PyObject* cuda_workspace(PyObject*, PyObject* arguments) {
  TupleReader t(arguments);
  const Params p = kRead(t);
  return t.ok() ? PyLong_FromLongLong(kBytes(p)) : nullptr;
}

template <class Params, Params (*kRead)(TupleReader&), int (*kLaunch)(const Params&, void*, void*)>
PyObject* cuda_launch_in(PyObject*, PyObject* arguments) {
  TupleReader t(arguments);
  const Params p = kRead(t);
  void* workspace = t.pointer();
  void* stream = t.pointer();
  return t.ok() ? checked(kLaunch(p, workspace, stream)) : nullptr;
}

}  // namespace vicinal
