// Keys of voxels and their stable sort: what the builders of segments are made of.
//
// A least-significant-digit radix sort of (key, index) items over the bits in use, at most 11 a pass. Every
// thread counts and moves a slice of its own, in the order of the slices, so the sort is stable and the
// result does not depend on the number of threads.
#include <cstring>

#include "memory.h"
#include "sort.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace vicinal::cpu {
namespace {

constexpr int kMostDigit = 11;
constexpr int64_t kSerial = 16384;  // fewer items than this are not worth a second thread

template <class Key>
struct Item {
  Key key;
  int32_t index;
};

int team_of(int64_t n, int threads) { return n < kSerial || threads < 1 ? 1 : threads; }

int member() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// One pass: items read(i), counted by digit and written by put(place, item).
template <class Read, class Put>
void move_by_digit(int64_t n, int shift, int digit, uint32_t* counts, int team, Read read, Put put) {
  const uint32_t buckets = 1u << digit, mask = buckets - 1;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const int t = member();
    const int64_t begin = n * t / team, end = n * (t + 1) / team;
    uint32_t* mine = counts + int64_t(t) * buckets;
    std::memset(mine, 0, sizeof(uint32_t) * buckets);
    for (int64_t i = begin; i < end; ++i) ++mine[static_cast<uint32_t>(read(i).key >> shift) & mask];
#pragma omp barrier
#pragma omp single
    {
      uint32_t place = 0;
      for (uint32_t d = 0; d < buckets; ++d) {
        for (int u = 0; u < team; ++u) {
          uint32_t& count = counts[int64_t(u) * buckets + d];
          const uint32_t here = count;
          count = place, place += here;
        }
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      const auto item = read(i);
      put(mine[static_cast<uint32_t>(item.key >> shift) & mask]++, item);
    }
  }
}

template <class Key>
void sort(const Key* keys, int64_t n, int bits, int32_t* order, Key* sorted, int threads) {
  const int team = team_of(n, threads), passes = bits <= 0 ? 1 : (bits + kMostDigit - 1) / kMostDigit;
  const int digit = bits <= 0 ? 1 : (bits + passes - 1) / passes;
  Arena counter(nullptr);
  const auto carve = [&](Arena& arena, Item<Key>** a, Item<Key>** b, uint32_t** counts) {
    *a = arena.take<Item<Key>>(passes > 1 ? n : 0), *b = arena.take<Item<Key>>(passes > 2 ? n : 0);
    *counts = arena.take<uint32_t>(int64_t(team) << digit);
  };
  Item<Key>*a, *b;
  uint32_t* counts;
  carve(counter, &a, &b, &counts);
  Arena arena(thread_scratch(counter.used()));
  carve(arena, &a, &b, &counts);
  const auto first = [=](int64_t i) { return Item<Key>{keys[i], static_cast<int32_t>(i)}; };
  const auto last = [=](uint32_t place, const Item<Key>& item) {
    order[place] = item.index, sorted[place] = item.key;
  };
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * digit;
    const auto read = [=](int64_t i) { return a[i]; };
    Item<Key>* to = pass ? b : a;
    const auto put = [=](uint32_t place, const Item<Key>& item) { to[place] = item; };
    const bool is_last = pass == passes - 1;
    if (pass == 0 && is_last) {
      move_by_digit(n, shift, digit, counts, team, first, last);
    } else if (pass == 0) {
      move_by_digit(n, shift, digit, counts, team, first, put);
    } else if (is_last) {
      move_by_digit(n, shift, digit, counts, team, read, last);
    } else {
      move_by_digit(n, shift, digit, counts, team, read, put);
      Item<Key>* swap = a;
      a = b, b = swap;
    }
  }
}

// kFields 0: any number.
template <int kFields, class Coord, class Key>
int64_t pack(const Coord* coords, int64_t n, int64_t stride, int any_fields, const int64_t* columns,
             const int64_t* sizes, const int64_t* tables, Key* keys, int threads) {
  const int fields = kFields ? kFields : any_fields, team = team_of(n, threads);
  int64_t wrong = n;
#pragma omp parallel for num_threads(team) if (team > 1) reduction(min : wrong) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const Coord* row = coords + i * stride;
    const int64_t* table = tables;
    int64_t key = 0;
    bool outside = false;
#pragma GCC unroll 4
    for (int f = 0; f < fields; ++f) {
      const int64_t c = row[columns[f]];
      const bool inside = static_cast<uint64_t>(c) < static_cast<uint64_t>(sizes[f]);
      outside |= !inside;
      if (inside) key += table[c];
      table += sizes[f];
    }
    if (outside && i < wrong) wrong = i;
    keys[i] = static_cast<Key>(key);
  }
  return wrong < n ? wrong : -1;
}

// A run begins where the key above its lowest `shift` bits changes. Every place is written, and kept if a run
// begins there: to needs n + 1 places.
template <class Key>
Runs starts(const Key* sorted, int64_t n, int shift, int32_t* to) {
  Runs found{0, -1};
  for (int64_t i = 0; i < n; ++i) {
    const bool begins = i == 0 || sorted[i] >> shift != sorted[i - 1] >> shift;
    if (i > 0 && sorted[i] == sorted[i - 1]) found.equal = i;
    to[found.count] = static_cast<int32_t>(i);
    found.count += begins;
  }
  to[found.count] = static_cast<int32_t>(n);
  return found;
}

// Moves bit i of a number below 2^21 to bit 3 i.
uint64_t spread(uint64_t x) {
  x = (x | x << 32) & 0x1f00000000ffffull, x = (x | x << 16) & 0x1f0000ff0000ffull;
  x = (x | x << 8) & 0x100f00f00f00f00full, x = (x | x << 4) & 0x10c30c30c30c30c3ull;
  return (x | x << 2) & 0x1249249249249249ull;
}

}  // namespace

void hilbert_codes(const int32_t* x, const int32_t* y, const int32_t* z, int64_t* codes, int64_t n, int depth,
                   int threads) {
  const int team = team_of(n, threads);
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    uint32_t p[3] = {static_cast<uint32_t>(x[i]), static_cast<uint32_t>(y[i]), static_cast<uint32_t>(z[i])};
    for (int b = depth - 1; b >= 0; --b) {
      const uint32_t low = (1u << b) - 1;
      for (int a = 0; a < 3; ++a) {
        const uint32_t set = 0u - (p[a] >> b & 1u), swap = (p[0] ^ p[a]) & low & ~set;
        p[0] ^= (low & set) | swap;
        p[a] ^= a ? swap : 0u;
      }
    }
    uint64_t h = spread(p[0]) << 2 | spread(p[1]) << 1 | spread(p[2]);
    for (int shift = 1; shift < 3 * depth; shift *= 2) h ^= h >> shift;
    codes[i] = static_cast<int64_t>(h);
  }
}

int64_t pack_keys(const void* coords, int coord_bytes, int64_t n, int64_t stride, int fields,
                  const int64_t* columns, const int64_t* sizes, const int64_t* tables, void* keys,
                  int key_bytes, int threads) {
  const auto run = [&](auto* c, auto* k) {
    return fields == 4 ? pack<4>(c, n, stride, fields, columns, sizes, tables, k, threads)
                       : pack<0>(c, n, stride, fields, columns, sizes, tables, k, threads);
  };
  const auto* c4 = static_cast<const int32_t*>(coords);
  const auto* c8 = static_cast<const int64_t*>(coords);
  auto* k4 = static_cast<int32_t*>(keys);
  auto* k8 = static_cast<int64_t*>(keys);
  if (coord_bytes == 4) return key_bytes == 4 ? run(c4, k4) : run(c4, k8);
  return key_bytes == 4 ? run(c8, k4) : run(c8, k8);
}

void sort_keys(const void* keys, int key_bytes, int64_t n, int bits, int32_t* order, void* sorted,
               int threads) {
  if (key_bytes == 4) {
    sort(static_cast<const int32_t*>(keys), n, bits, order, static_cast<int32_t*>(sorted), threads);
  } else {
    sort(static_cast<const int64_t*>(keys), n, bits, order, static_cast<int64_t*>(sorted), threads);
  }
}

Runs run_starts(const void* sorted, int key_bytes, int64_t n, int shift, int32_t* to) {
  return key_bytes == 4 ? starts(static_cast<const int32_t*>(sorted), n, shift, to)
                        : starts(static_cast<const int64_t*>(sorted), n, shift, to);
}

}  // namespace vicinal::cpu
