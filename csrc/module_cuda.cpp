// Bindings of the CUDA kernels. Launch arguments end with the handle of a stream; where there is a function
// for the bytes of a workspace, with that workspace before it.
#include <pybind11/pybind11.h>

#include "hash_args.h"
#include "joint_args.h"
#include "linear_args.h"
#include "module_cuda_launch.h"

namespace py = pybind11;

namespace vicinal {

#if VICINAL_WITH_CUDA

namespace {

PyMethodDef methods[] = {
    {"cuda_attend_fwd", cuda_launch<AttendFwd, read_attend_fwd, cuda::attend_fwd>, METH_O,
     "cuda_attend_fwd(arguments): csrc/module_args.h has the order; then the stream."},
    {"cuda_attend_bwd_workspace", cuda_workspace<AttendBwd, read_attend_bwd, cuda::attend_bwd_workspace>,
     METH_O, "cuda_attend_bwd_workspace(arguments): bytes that cuda_attend_bwd needs on the current device."},
    {"cuda_attend_bwd", cuda_launch_in<AttendBwd, read_attend_bwd, cuda::attend_bwd>, METH_O,
     "cuda_attend_bwd(arguments): csrc/module_args.h has the order; then the workspace and the stream."},
    {"cuda_linear_fwd_workspace", cuda_workspace<LinearFwd, read_linear_fwd, cuda::linear_fwd_workspace>,
     METH_O, "cuda_linear_fwd_workspace(arguments): bytes that cuda_linear_fwd needs."},
    {"cuda_linear_fwd", cuda_launch_in<LinearFwd, read_linear_fwd, cuda::linear_fwd>, METH_O,
     "cuda_linear_fwd(arguments): csrc/linear_args.h has the order; then the workspace and the stream."},
    {"cuda_linear_bwd_workspace", cuda_workspace<LinearBwd, read_linear_bwd, cuda::linear_bwd_workspace>,
     METH_O, "cuda_linear_bwd_workspace(arguments): bytes that cuda_linear_bwd needs."},
    {"cuda_linear_bwd", cuda_launch_in<LinearBwd, read_linear_bwd, cuda::linear_bwd>, METH_O,
     "cuda_linear_bwd(arguments), likewise."},
    {"cuda_linear_step", cuda_launch<LinearStep, read_linear_step, cuda::linear_step>, METH_O,
     "cuda_linear_step(arguments): csrc/linear_args.h has the order; then the stream."},
    {"cuda_hash_fwd_workspace", cuda_workspace<HashFwd, read_hash_fwd, cuda::hash_fwd_workspace>, METH_O,
     "cuda_hash_fwd_workspace(arguments): bytes that cuda_hash_fwd needs."},
    {"cuda_hash_fwd", cuda_launch_in<HashFwd, read_hash_fwd, cuda::hash_fwd>, METH_O,
     "cuda_hash_fwd(arguments): csrc/hash_args.h has the order; then the workspace and the stream."},
    {"cuda_hash_bwd_workspace", cuda_workspace<HashBwd, read_hash_bwd, cuda::hash_bwd_workspace>, METH_O,
     "cuda_hash_bwd_workspace(arguments): bytes that cuda_hash_bwd needs."},
    {"cuda_hash_bwd", cuda_launch_in<HashBwd, read_hash_bwd, cuda::hash_bwd>, METH_O,
     "cuda_hash_bwd(arguments): csrc/hash_args.h has the order; then the workspace and the stream."},
    {"cuda_joint_fwd_workspace", cuda_workspace<JointFwd, read_joint_fwd, cuda::joint_fwd_workspace>, METH_O,
     "cuda_joint_fwd_workspace(arguments): bytes that cuda_joint_fwd needs."},
    {"cuda_joint_fwd", cuda_launch_in<JointFwd, read_joint_fwd, cuda::joint_fwd>, METH_O,
     "cuda_joint_fwd(arguments): csrc/joint_args.h has the order; then the workspace and the stream."},
    {"cuda_joint_bwd_workspace", cuda_workspace<JointBwd, read_joint_bwd, cuda::joint_bwd_workspace>, METH_O,
     "cuda_joint_bwd_workspace(arguments): bytes that cuda_joint_bwd needs."},
    {"cuda_joint_bwd", cuda_launch_in<JointBwd, read_joint_bwd, cuda::joint_bwd>, METH_O,
     "cuda_joint_bwd(arguments): csrc/joint_args.h has the order; then the workspace and the stream."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_cuda(py::module_& m) { PyModule_AddFunctions(m.ptr(), methods); }

#else

void bind_cuda(py::module_&) {}

#endif

}  // namespace vicinal
