// Bindings of edge attention: a tuple as module_edge.h reads it, then the number of threads.
#include "module_edge.h"

#include <pybind11/pybind11.h>

#include "module_launch.h"

namespace py = pybind11;

namespace vicinal {
namespace {

PyMethodDef methods[] = {
    {"edge_fwd", launch<EdgeFwd, read_edge_fwd, cpu::edge_fwd>, METH_O,
     "edge_fwd(arguments): csrc/module_edge.h has the order; the last one is the number of threads."},
    {"edge_bwd", launch<EdgeBwd, read_edge_bwd, cpu::edge_bwd>, METH_O,
     "edge_bwd(arguments): csrc/module_edge.h has the order; the last one is the number of threads."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_edge(py::module_& m) { PyModule_AddFunctions(m.ptr(), methods); }

}  // namespace vicinal
