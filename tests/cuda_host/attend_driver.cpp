// Runs one attend launch from a case file on the emulator and writes the buffers back.
#include "attend.h"
#include "case_file.h"

using namespace vicinal;

int main(int argc, char** argv) {
  return case_file::run(argc, argv, [](const case_file::Case& c, auto workspace) {
    if (!strcmp(c.kind, "fwd")) return cuda::attend_fwd(case_file::params_of<AttendFwd>(c), nullptr);
    const AttendBwd p = case_file::params_of<AttendBwd>(c);
    return cuda::attend_bwd(p, workspace(cuda::attend_bwd_workspace(p)), nullptr);
  });
}
