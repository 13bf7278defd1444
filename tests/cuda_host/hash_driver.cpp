// Runs one launch of hash attention from a case file on the emulator and writes the buffers back.
#include "case_file.h"
#include "hash.h"

using namespace vicinal;

int main(int argc, char** argv) {
  return case_file::run(argc, argv, [](const case_file::Case& c, auto workspace) {
    if (!strcmp(c.kind, "fwd")) {
      const HashFwd p = case_file::params_of<HashFwd>(c);
      return cuda::hash_fwd(p, workspace(cuda::hash_fwd_workspace(p)), nullptr);
    }
    const HashBwd p = case_file::params_of<HashBwd>(c);
    return cuda::hash_bwd(p, workspace(cuda::hash_bwd_workspace(p)), nullptr);
  });
}
