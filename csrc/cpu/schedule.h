// How a call is cut into chunks: a group of heads (whose expanded bias fits the cache) times a run of (batch,
// row) items. Depends on the problem alone, never on the number of threads: sums over chunks have one order.
#pragma once
#include <cstdint>

#include "attend.h"

namespace vicinal::VICINAL_ISA {

struct Range {
  int64_t index;       // of the run of items
  int64_t begin, end;  // items: batch * n_rows + row
  int32_t h0, h1;      // heads
};

struct Schedule {
  int32_t group_heads, groups;
  int64_t items, chunk_items, item_chunks;

  int64_t chunks() const { return groups * item_chunks; }
  Range range(const Attend& a, int64_t chunk) const {
    const int64_t index = chunk % item_chunks, begin = index * chunk_items;
    const int32_t h0 = static_cast<int32_t>(chunk / item_chunks) * group_heads;
    return {index, begin, begin + chunk_items < items ? begin + chunk_items : items, h0,
            h0 + group_heads < a.heads ? h0 + group_heads : a.heads};
  }
};

inline int64_t at_least(int64_t x, int64_t low) { return x < low ? low : x; }

// head_bytes: what a head keeps in the cache; flops: of one item and head.
inline Schedule make_schedule(const Attend& a, int64_t head_bytes, double flops) {
  constexpr int64_t kCacheBytes = 384 * 1024, kFewest = 16, kMostItemChunks = 32;
  // Every chunk expands the bias, and adds its gradient to the table: as much work as half an item of 7 x 7.
  const int64_t least_items = a.bias ? 4 : 1;
  Schedule s;
  s.items = a.batch * a.plan.n_rows;
  int64_t heads = a.heads;
  if (a.bias) heads = at_least(kCacheBytes / at_least(head_bytes, 1), 1);
  if (heads > a.heads) heads = a.heads;
  const int64_t runs = at_least(s.items / least_items, 1);
  while (heads > 1 && runs * ((a.heads + heads - 1) / heads) < kFewest) heads = (heads + 1) / 2;
  s.groups = static_cast<int32_t>((a.heads + heads - 1) / heads);
  s.group_heads = static_cast<int32_t>((a.heads + s.groups - 1) / s.groups);
  s.groups = (a.heads + s.group_heads - 1) / s.group_heads;
  constexpr double kChunkFlops = 4e6;  // some twenty microseconds
  const double item_flops = flops * s.group_heads;
  int64_t most = at_least(static_cast<int64_t>(s.items * item_flops / kChunkFlops), 1);
  if (most > kMostItemChunks) most = kMostItemChunks;
  if (most > runs) most = runs;
  s.chunk_items = at_least((s.items + at_least(most, 1) - 1) / at_least(most, 1), 1);
  s.item_chunks = (s.items + s.chunk_items - 1) / s.chunk_items;
  return s;
}

}  // namespace vicinal::VICINAL_ISA
