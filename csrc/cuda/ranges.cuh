// Rows with ranges: which tiles a warp may pass over.
#pragma once

#include "tile.cuh"

namespace vicinal::cuda {

// Over all lanes, field by field of a row's ranges, the least or the largest x.
template <bool kLargest>
__device__ inline int32_t extreme(int32_t x, int32_t guard) {
  int32_t result = 0, low = 1;
  for (int32_t rest = guard; rest; rest &= rest - 1) {
    const int32_t top = rest & -rest;
    int32_t field = x & (top - low);
    for (int lanes = 16; lanes; lanes /= 2) {
      const int32_t other = simt::shfl_xor(field, lanes);
      field = (other < field) == kLargest ? field : other;
    }
    result |= field;
    low = top << 1;
  }
  return result;
}

__device__ inline bool any_lane(bool x) {
  int seen = x;
  for (int lanes = 16; lanes; lanes /= 2) seen |= simt::shfl_xor(seen, lanes);
  return seen;
}

// Which tiles of the other side a warp of a row with ranges has to look at: those with a slot inside the
// smallest box around what its own 16 slots see, or are seen by.
struct WarpBox {
  int32_t first, last, guard;

  __device__ WarpBox(const QuerySlot* queries, int32_t guard) : first(0), last(0), guard(guard) {
    if (!guard) return;
    const QuerySlot& q = queries[threadIdx.x % 16];
    first = extreme<false>(q.token == kNone ? -1 : q.region, guard);
    last = extreme<true>(q.token == kNone ? 0 : q.coord, guard);
  }
  __device__ WarpBox(const KeySlot* keys, int32_t guard) : first(0), last(0), guard(guard) {
    if (!guard) return;
    const KeySlot& k = keys[threadIdx.x % 16];
    first = extreme<false>(k.token == kNone ? -1 : k.coord, guard);
    last = extreme<true>(k.token == kNone ? 0 : k.coord, guard);
    if (any_lane(k.token != kNone && k.region < 0)) this->guard = 0;  // an extra row is seen by all
  }

  __device__ bool sees(const KeySlot& k) const {
    return k.token != kNone && (k.region < 0 || visible(first, last, k.coord, guard));
  }
  __device__ bool sees(const QuerySlot& q) const {
    return q.token != kNone && (((last | guard) - q.region) & ((q.coord | guard) - first) & guard) == guard;
  }
  // Whether none of `count` slots is of interest.
  template <class Slot>
  __device__ bool skips(const Slot* slots, int count) const {
    if (!guard) return false;
    bool seen = false;
    for (int i = threadIdx.x % 32; i < count; i += 32) seen = seen || sees(slots[i]);
    return !any_lane(seen);
  }
};

}  // namespace vicinal::cuda
