// Bindings of the CUDA kernels. Launch arguments end with the handle of a stream; those of the backward with
// a workspace before it, whose size attend_bwd_workspace gives.
#include <pybind11/pybind11.h>

#include "module_args.h"

namespace py = pybind11;

namespace vicinal {

#if VICINAL_WITH_CUDA

namespace {

PyObject* checked(int error) {
  if (!error) Py_RETURN_NONE;
  return PyErr_Format(PyExc_RuntimeError, "CUDA error %d: %s", error, cuda::error_text(error));
}

PyObject* forward(PyObject*, PyObject* arguments) {
  TupleReader t(arguments);
  const AttendFwd p = read_attend_fwd(t);
  void* stream = t.pointer();
  return t.ok() ? checked(cuda::attend_fwd(p, stream)) : nullptr;
}

PyObject* workspace(PyObject*, PyObject* arguments) {
  TupleReader t(arguments);
  const AttendBwd p = read_attend_bwd(t);
  return t.ok() ? PyLong_FromLongLong(cuda::attend_bwd_workspace(p)) : nullptr;
}

PyObject* backward(PyObject*, PyObject* arguments) {
  TupleReader t(arguments);
  const AttendBwd p = read_attend_bwd(t);
  void* workspace = t.pointer();
  void* stream = t.pointer();
  return t.ok() ? checked(cuda::attend_bwd(p, workspace, stream)) : nullptr;
}

PyMethodDef methods[] = {
    {"cuda_attend_fwd", forward, METH_O,
     "cuda_attend_fwd(arguments): csrc/module_args.h has the order; then the stream."},
    {"cuda_attend_bwd_workspace", workspace, METH_O,
     "cuda_attend_bwd_workspace(arguments): bytes that cuda_attend_bwd needs on the current device."},
    {"cuda_attend_bwd", backward, METH_O,
     "cuda_attend_bwd(arguments): csrc/module_args.h has the order; then the workspace and the stream."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_cuda(py::module_& m) { PyModule_AddFunctions(m.ptr(), methods); }

#else

void bind_cuda(py::module_&) {}

#endif

}  // namespace vicinal
