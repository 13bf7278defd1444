// The pairwise facts of a plan, one text for host and device. The Python twin is python/vicinal/pattern.py.
#pragma once
#include "attend.h"
#include "philox.h"

namespace vicinal {

VICINAL_HD int32_t bias_index(int32_t q_code, int32_t k_code) { return q_code + k_code; }
VICINAL_HD bool crosses(int32_t q_region, int32_t k_region) { return q_region != k_region; }
// Whether a coord lies between the first and the last one on every axis: a borrow on a field's way clears its
// guard bit.
VICINAL_HD bool visible(int32_t first, int32_t last, int32_t coord, int32_t guard) {
  return (((coord | guard) - first) & ((last | guard) - coord) & guard) == guard;
}

// The entry of slot `slot` of a box: the sum over its axes.
VICINAL_HD AxisEntry slot_entry(const AxisEntry* axes, const int32_t begin[3], const int32_t extent[3],
                                int32_t slot) {
  const int32_t r2 = slot % extent[2], rest = slot / extent[2];
  const AxisEntry a = axes[begin[0] + rest / extent[1]];
  const AxisEntry b = axes[begin[1] + rest % extent[1]];
  const AxisEntry c = axes[begin[2] + r2];
  return {a.token + b.token + c.token, a.region + b.region + c.region, a.code + b.code + c.code,
          a.coord + b.coord + c.coord};
}

}  // namespace vicinal
