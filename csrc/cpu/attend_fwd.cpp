// attend, forward.
#include "naive.h"

namespace vicinal::VICINAL_ISA {

void attend_fwd(const AttendFwd& p, int threads) {
  switch (p.a.dtype) {
    case kF32:
      return naive_fwd<float, float>(p, threads);
    case kF64:
      return naive_fwd<double, double>(p, threads);
    case kBF16:
      return naive_fwd<BFloat16, float>(p, threads);
    case kF16:
      return naive_fwd<Half, float>(p, threads);
  }
}

}  // namespace vicinal::VICINAL_ISA
