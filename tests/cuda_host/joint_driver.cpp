// Runs one launch of joint attention from a case file on the emulator and writes the buffers back.
#include "case_file.h"
#include "joint.h"

using namespace vicinal;

int main(int argc, char** argv) {
  return case_file::run(argc, argv, [](const case_file::Case& c, auto workspace) {
    if (!strcmp(c.kind, "fwd")) {
      const JointFwd p = case_file::params_of<JointFwd>(c);
      return cuda::joint_fwd(p, workspace(cuda::joint_fwd_workspace(p)), nullptr);
    }
    const JointBwd p = case_file::params_of<JointBwd>(c);
    return cuda::joint_bwd(p, workspace(cuda::joint_bwd_workspace(p)), nullptr);
  });
}
