// Bias by the clipped offset of two coordinates, axis by axis (RelTable): kRelAxes rows of a table per pair.
//
// Keys of a plan row have few different coordinates on an axis. A block of queries looks the table up once
// for each of these, into E[class][query], and a pair then adds three vectors of E; the gradient takes the
// same way back: sums per class and query, then one addition to the table for each. Up to the table, lanes
// are queries.
#pragma once
#include "memory.h"
#include "simd.h"
#include "slots.h"

namespace vicinal::VICINAL_ISA {

template <class T>
struct Relative {
  static constexpr int kN = kLanes<T>;

  int32_t bound = 0, columns = 0, classes[kRelAxes] = {};
  int64_t b = -1, row = -1;    // of the classes that are there
  int32_t *value, *key_class;  // coordinates of the classes [axis][k_most]; class of a key [axis][k_most]
  int32_t* q_coord;            // [axis][q_most]
  T *expanded, *sums;          // [axis][k_most][columns]
  int64_t k_most = 0, q_most = 0;

  void carve(cpu::Arena& arena, const Attend& a, int64_t keys, int64_t queries, int32_t block,
             bool backward) {
    if (!a.rel) return;
    bound = a.rel_size / 2, columns = block, k_most = keys, q_most = queries, row = -1;
    value = arena.take<int32_t>(kRelAxes * k_most), key_class = arena.take<int32_t>(kRelAxes * k_most);
    q_coord = arena.take<int32_t>(kRelAxes * q_most);
    expanded = arena.take<T>(kRelAxes * k_most * columns);
    sums = backward ? arena.take<T>(kRelAxes * k_most * columns) : nullptr;
  }

  // The classes of the keys of a plan row.
  void set_row(const Attend& a, const Slots<T>& s) {
    if (b == s.b && row == s.row) return;
    b = s.b, row = s.row;
    for (int32_t axis = 0; axis < kRelAxes; ++axis) {
      for (int32_t i = 0; i < s.nq; ++i)
        q_coord[axis * q_most + i] = a.q_coords[int64_t(s.q_token[i]) * kRelAxes + axis];
      int32_t *of_key = key_class + axis * k_most, *found = value + axis * k_most;
      for (int32_t j = 0; j < s.nk; ++j) found[j] = a.k_coords[int64_t(s.k_token[j]) * kRelAxes + axis];
      sort(found, s.nk);
      int32_t n = 0;
      for (int32_t j = 0; j < s.nk; ++j) {
        if (!n || found[n - 1] != found[j]) found[n++] = found[j];
      }
      classes[axis] = n;
      for (int32_t j = 0; j < s.nk; ++j)
        of_key[j] = rank(found, n, a.k_coords[int64_t(s.k_token[j]) * kRelAxes + axis]);
    }
  }
  // Heap sort: no std templates in code of an instruction set.
  static void sort(int32_t* x, int32_t n) {
    const auto sift = [x](int32_t root, int32_t end) {
      for (int32_t child; (child = 2 * root + 1) < end; root = child) {
        if (child + 1 < end && x[child] < x[child + 1]) ++child;
        if (x[root] >= x[child]) return;
        const int32_t t = x[root];
        x[root] = x[child], x[child] = t;
      }
    };
    for (int32_t i = n / 2 - 1; i >= 0; --i) sift(i, n);
    for (int32_t end = n - 1; end > 0; --end) {
      const int32_t t = x[0];
      x[0] = x[end], x[end] = t;
      sift(0, end);
    }
  }
  static int32_t rank(const int32_t* x, int32_t n, int32_t wanted) {
    int32_t low = 0, high = n - 1;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (x[middle] < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
  // Row of an axis's table for a query and a class. In 64 bits: coordinates may be any.
  int32_t entry(int32_t axis, int32_t query, int32_t c) const {
    const int64_t d = int64_t(q_coord[axis * q_most + query]) - value[axis * k_most + c];
    return static_cast<int32_t>(d < -bound ? -bound : d > bound ? bound : d) + bound;
  }

  // E of queries first .. first + n - 1, from a head's table [axis][2 bound + 1], in units of the scores.
  [[gnu::noinline]] void expand(const T* table, int32_t first, int32_t n, T unit) {
    for (int32_t axis = 0; axis < kRelAxes; ++axis) {
      const T* from = table + axis * (2 * bound + 1);
      for (int32_t c = 0; c < classes[axis]; ++c) {
        T* to = expanded + (axis * k_most + c) * columns;
        for (int32_t i = 0; i < n; ++i) to[i] = from[entry(axis, first + i, c)] * unit;
        for (int32_t i = n; i < round_up(n, kN); ++i) to[i] = 0;
      }
    }
  }
  const T* of_key(int32_t axis, int32_t j) const {
    return expanded + (axis * k_most + key_class[axis * k_most + j]) * columns;
  }
  // s [nk][columns] += E of the first `wide` queries.
  [[gnu::noinline]] void add(T* s, int32_t nk, int32_t wide) const {
    for (int32_t j = 0; j < nk; ++j) {
      const T *x = of_key(0, j), *y = of_key(1, j), *z = of_key(2, j);
      for (int32_t c = 0; c < wide; c += kN) {
        T* to = s + int64_t(j) * columns + c;
        store(to, load(to) + (load(x + c) + load(y + c) + load(z + c)));
      }
    }
  }
  // table [axis][2 bound + 1] += ds [nk][columns] of queries first .. first + n - 1.
  [[gnu::noinline]] void gradient(const T* ds, int32_t nk, int32_t first, int32_t n, T* table) {
    const int32_t wide = round_up(n, kN);
    for (int32_t axis = 0; axis < kRelAxes; ++axis) {
      T* base = sums + axis * k_most * columns;
      for (int32_t c = 0; c < classes[axis]; ++c)
        for (int32_t i = 0; i < wide; i += kN) store(base + c * columns + i, Vec<T>{});
      for (int32_t j = 0; j < nk; ++j) {
        T* to = base + key_class[axis * k_most + j] * columns;
        const T* from = ds + int64_t(j) * columns;
        for (int32_t i = 0; i < wide; i += kN) store(to + i, load(to + i) + load(from + i));
      }
      T* out = table + axis * (2 * bound + 1);
      for (int32_t c = 0; c < classes[axis]; ++c)
        for (int32_t i = 0; i < n; ++i) out[entry(axis, first + i, c)] += base[c * columns + i];
    }
  }
};

}  // namespace vicinal::VICINAL_ISA
