// Bindings of the linear kernels of the CPU.
#include <pybind11/pybind11.h>

#include "linear_args.h"
#include "module_launch.h"

namespace py = pybind11;

namespace vicinal {
namespace {

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
