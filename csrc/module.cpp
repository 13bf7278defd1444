// The Python module vicinal._C. It takes raw pointers and strides and includes no torch header, so one build
// serves every torch version.

#include <pybind11/pybind11.h>

#include "vicinal_config.h"

#define DECLARE(isa)       \
  namespace vicinal::isa { \
  int float_lanes();       \
  }
VICINAL_FOR_EACH_ISA(DECLARE)
#undef DECLARE

namespace py = pybind11;

namespace vicinal {
void bind_cpu(py::module_& m);
void bind_context(py::module_& m);
void bind_edge(py::module_& m);
void bind_hash(py::module_& m);
void bind_joint(py::module_& m);
void bind_cuda(py::module_& m);
void bind_sort(py::module_& m);
void bind_linear(py::module_& m);
}  // namespace vicinal

namespace {

py::list words(const char* text) { return py::str(text).attr("split")(); }

py::dict build_info() {
  py::dict float_lanes;
#define COLLECT(isa) float_lanes[#isa] = vicinal::isa::float_lanes();
  VICINAL_FOR_EACH_ISA(COLLECT)
#undef COLLECT
  py::dict info;
  info["version"] = VICINAL_VERSION;
  info["compiler"] = VICINAL_COMPILER;
  info["flags"] = VICINAL_CXX_FLAGS;
  info["isas"] = py::list(float_lanes);
  info["float_lanes"] = float_lanes;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["with_cuda"] = bool(VICINAL_WITH_CUDA);
  info["cuda_archs"] = words(VICINAL_CUDA_ARCHS);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of vicinal.";
  m.def("build_info", &build_info, "How this library was compiled.");
  vicinal::bind_cpu(m);
  vicinal::bind_context(m);
  vicinal::bind_edge(m);
  vicinal::bind_hash(m);
  vicinal::bind_joint(m);
  vicinal::bind_cuda(m);
  vicinal::bind_sort(m);
  vicinal::bind_linear(m);
}
