// Bindings of joint attention on the CPU.
#include <pybind11/pybind11.h>

#include "joint_args.h"
#include "module_launch.h"

namespace py = pybind11;

namespace vicinal {
namespace {

PyMethodDef methods[] = {
    {"joint_fwd", launch<JointFwd, read_joint_fwd, cpu::joint_fwd>, METH_O,
     "joint_fwd(arguments): csrc/joint_args.h has the order; the last one is the number of threads."},
    {"joint_bwd", launch<JointBwd, read_joint_bwd, cpu::joint_bwd>, METH_O,
     "joint_bwd(arguments): csrc/joint_args.h has the order; the last one is the number of threads."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_joint(py::module_& m) { PyModule_AddFunctions(m.ptr(), methods); }

}  // namespace vicinal
