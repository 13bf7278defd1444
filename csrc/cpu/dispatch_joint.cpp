// Joint attention of the instruction set in use.
#include <cstring>

#include "dispatch.h"
#include "joint.h"
#include "vicinal_config.h"

#define DECLARE(isa)                              \
  namespace vicinal::isa {                        \
  void joint_fwd(const JointFwd& p, int threads); \
  void joint_bwd(const JointBwd& p, int threads); \
  }
VICINAL_FOR_EACH_ISA(DECLARE)
#undef DECLARE

namespace vicinal::cpu {

void joint_fwd(const JointFwd& p, int threads) {
  const char* name = isa();
#define RUN(isa) \
  if (!std::strcmp(name, #isa)) return vicinal::isa::joint_fwd(p, threads);
  VICINAL_FOR_EACH_ISA(RUN)
#undef RUN
}

void joint_bwd(const JointBwd& p, int threads) {
  const char* name = isa();
#define RUN(isa) \
  if (!std::strcmp(name, #isa)) return vicinal::isa::joint_bwd(p, threads);
  VICINAL_FOR_EACH_ISA(RUN)
#undef RUN
}

}  // namespace vicinal::cpu
