// The linear kernels of the instruction set in use.
#include <cstring>

#include "dispatch.h"
#include "linear.h"
#include "vicinal_config.h"

#define DECLARE(isa)                                  \
  namespace vicinal::isa {                            \
  void linear_fwd(const LinearFwd& p, int threads);   \
  void linear_bwd(const LinearBwd& p, int threads);   \
  void linear_step(const LinearStep& p, int threads); \
  }
VICINAL_FOR_EACH_ISA(DECLARE)
#undef DECLARE

namespace vicinal::cpu {

#define RUN(isa, function) \
  if (!std::strcmp(name, #isa)) return vicinal::isa::function(p, threads);

void linear_fwd(const LinearFwd& p, int threads) {
  const char* name = isa();
#define RUN_FWD(isa) RUN(isa, linear_fwd)
  VICINAL_FOR_EACH_ISA(RUN_FWD)
}

void linear_bwd(const LinearBwd& p, int threads) {
  const char* name = isa();
#define RUN_BWD(isa) RUN(isa, linear_bwd)
  VICINAL_FOR_EACH_ISA(RUN_BWD)
}

void linear_step(const LinearStep& p, int threads) {
  const char* name = isa();
#define RUN_STEP(isa) RUN(isa, linear_step)
  VICINAL_FOR_EACH_ISA(RUN_STEP)
}

}  // namespace vicinal::cpu
