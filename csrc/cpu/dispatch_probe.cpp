// The probe of the instruction set in use.
#include <cstring>

#include "dispatch.h"
#include "vicinal_config.h"

#define DECLARE(isa)                             \
  namespace vicinal::isa {                       \
  double fma_probe(double seconds, int threads); \
  }
VICINAL_FOR_EACH_ISA(DECLARE)
#undef DECLARE

namespace vicinal::cpu {

double fma_probe(double seconds, int threads) {
  const char* name = isa();
#define RUN(isa) \
  if (!std::strcmp(name, #isa)) return vicinal::isa::fma_probe(seconds, threads);
  VICINAL_FOR_EACH_ISA(RUN)
#undef RUN
  return 0.0;  // not reached: isa() is one of them
}

}  // namespace vicinal::cpu
