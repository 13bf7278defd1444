// attend, backward.
#include "naive.h"

namespace vicinal::VICINAL_ISA {

void attend_bwd(const AttendBwd& p, int threads) {
  switch (p.a.dtype) {
    case kF32:
      return naive_bwd<float, float>(p, threads);
    case kF64:
      return naive_bwd<double, double>(p, threads);
    case kBF16:
      return naive_bwd<BFloat16, float>(p, threads);
    case kF16:
      return naive_bwd<Half, float>(p, threads);
  }
}

}  // namespace vicinal::VICINAL_ISA
