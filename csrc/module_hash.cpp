// Bindings of hash attention on the CPU.
#include <pybind11/pybind11.h>

#include "hash_args.h"
#include "module_launch.h"

namespace py = pybind11;

namespace vicinal {
namespace {

PyMethodDef methods[] = {
    {"hash_fwd", launch<HashFwd, read_hash_fwd, cpu::hash_fwd>, METH_O,
     "hash_fwd(arguments): csrc/hash_args.h has the order; the last one is the number of threads."},
    {"hash_bwd", launch<HashBwd, read_hash_bwd, cpu::hash_bwd>, METH_O,
     "hash_bwd(arguments): csrc/hash_args.h has the order; the last one is the number of threads."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_hash(py::module_& m) { PyModule_AddFunctions(m.ptr(), methods); }

}  // namespace vicinal
