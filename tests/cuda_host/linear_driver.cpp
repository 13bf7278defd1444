// Runs one launch of linear attention from a case file on the emulator and writes the buffers back.
#include "case_file.h"
#include "linear.h"

using namespace vicinal;

int main(int argc, char** argv) {
  return case_file::run(argc, argv, [](const case_file::Case& c, auto workspace) {
    if (!strcmp(c.kind, "fwd")) {
      const LinearFwd p = case_file::params_of<LinearFwd>(c);
      return cuda::linear_fwd(p, workspace(cuda::linear_fwd_workspace(p)), nullptr);
    }
    if (!strcmp(c.kind, "bwd")) {
      const LinearBwd p = case_file::params_of<LinearBwd>(c);
      return cuda::linear_bwd(p, workspace(cuda::linear_bwd_workspace(p)), nullptr);
    }
    return cuda::linear_step(case_file::params_of<LinearStep>(c), nullptr);
  });
}
