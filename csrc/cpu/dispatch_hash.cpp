// Hash attention of the instruction set in use.
#include <cstring>

#include "dispatch.h"
#include "hash.h"
#include "vicinal_config.h"

#define DECLARE(isa)                            \
  namespace vicinal::isa {                      \
  void hash_fwd(const HashFwd& p, int threads); \
  void hash_bwd(const HashBwd& p, int threads); \
  }
VICINAL_FOR_EACH_ISA(DECLARE)
#undef DECLARE

namespace vicinal::cpu {

void hash_fwd(const HashFwd& p, int threads) {
  const char* name = isa();
#define RUN(isa) \
  if (!std::strcmp(name, #isa)) return vicinal::isa::hash_fwd(p, threads);
  VICINAL_FOR_EACH_ISA(RUN)
#undef RUN
}

void hash_bwd(const HashBwd& p, int threads) {
  const char* name = isa();
#define RUN(isa) \
  if (!std::strcmp(name, #isa)) return vicinal::isa::hash_bwd(p, threads);
  VICINAL_FOR_EACH_ISA(RUN)
#undef RUN
}

}  // namespace vicinal::cpu
