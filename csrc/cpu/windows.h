// A plan row seen from its centres, each of which reads a box of others ("window"). In the forward pass and
// in the pass over queries of the backward, centres are queries and others are keys; in the pass over
// key_plan it is the other way round. The visible others of a centre are a range on each axis, and neither
// end of it ever decreases along the axis.
//
// Others are packed as rows, and may be cut into slabs that fit the second-level cache: ranges of the first
// axis that has more than one place, so a slab is a run of the row's others.
#pragma once
#include "memory.h"
#include "pattern.h"
#include "simd.h"

namespace vicinal::VICINAL_ISA {

struct Span {
  int32_t begin, end;
};

// What a centre reads of a slab: lines of contiguous rows.
struct Window {
  int32_t first;  // row in the slab
  int32_t outer, lines, width;
  int32_t count() const { return outer * lines * width; }
  bool same_shape(const Window& x) const { return outer == x.outer && lines == x.lines && width == x.width; }
};

struct Slab {
  int32_t begin, end;   // places of the axis that is cut
  int32_t first, size;  // others
};

struct Windows {
  int32_t centres, others;
  int32_t centre_extent[3], extent[3];
  Span* span[3];
  int32_t *token, *code, *other_token, *other_code;
  int32_t cut;        // the axis that slabs cut
  int32_t code_step;  // between neighbours on the last axis

  void carve(cpu::Arena& arena, int64_t most_centres, int64_t most_others) {
    for (Span*& s : span) s = arena.take<Span>(most_centres);
    token = arena.take<int32_t>(most_centres), code = arena.take<int32_t>(most_centres);
    other_token = arena.take<int32_t>(most_others), other_code = arena.take<int32_t>(most_others);
  }

  void set(const Plan& plan, int64_t index, bool centres_are_keys) {
    const PlanRow& r = plan.rows[index];
    const int32_t *begin = centres_are_keys ? r.k_begin : r.q_begin,
                  *other = centres_are_keys ? r.q_begin : r.k_begin;
    for (int a = 0; a < 3; ++a) {
      centre_extent[a] = centres_are_keys ? r.k_extent[a] : r.q_extent[a];
      extent[a] = centres_are_keys ? r.q_extent[a] : r.k_extent[a];
    }
    centres = list(plan.axes, begin, centre_extent, token, code);
    others = list(plan.axes, other, extent, other_token, other_code);
    const bool ranges = (r.flags & kRowRanges) != 0;
    for (int a = 0; a < 3; ++a) {
      Span last = {0, 0};
      for (int32_t i = 0; i < centre_extent[a]; ++i) {
        const AxisEntry& centre = plan.axes[begin[a] + i];
        const auto sees = [&](int32_t j) {
          const AxisEntry& o = plan.axes[other[a] + j];
          return !ranges || (centres_are_keys ? visible(o.region, o.coord, centre.coord, plan.guard)
                                              : visible(centre.region, centre.coord, o.coord, plan.guard));
        };
        span[a][i] = seen(last, extent[a], sees);
        if (span[a][i].begin < span[a][i].end) last = span[a][i];
      }
    }
    set_cut();
    code_step = extent[2] > 1 ? plan.axes[other[2] + 1].code - plan.axes[other[2]].code : 1;
    for (int32_t j = 2; j < extent[2]; ++j) {
      if (plan.axes[other[2] + j].code - plan.axes[other[2] + j - 1].code != code_step) code_step = 0;
    }
  }

  void set_cut() { cut = extent[0] > 1 ? 0 : extent[1] > 1 ? 1 : 2; }
  // Slab `index` of those of at most `most` others (but whole places of the axis that is cut).
  int32_t slabs(int64_t most) const {
    const int64_t places = most / inner() > 1 ? most / inner() : 1;
    return extent[cut] > places ? static_cast<int32_t>((extent[cut] + places - 1) / places) : 1;
  }
  Slab slab(int32_t index, int32_t count) const {
    const int32_t begin = static_cast<int32_t>(int64_t(extent[cut]) * index / count),
                  end = static_cast<int32_t>(int64_t(extent[cut]) * (index + 1) / count);
    return {begin, end, begin * inner(), (end - begin) * inner()};
  }
  int32_t inner() const {  // others per place of the axis that is cut
    const int32_t all = (cut < 1 ? extent[1] : 1) * (cut < 2 ? extent[2] : 1);
    return all > 1 ? all : 1;
  }

  // What the centre at places i0, i1, i2 reads of the slab.
  Window window(int32_t i0, int32_t i1, int32_t i2, const Slab& slab) const {
    Span s[3] = {span[0][i0], span[1][i1], span[2][i2]};
    Span& c = s[cut];
    c.begin = c.begin > slab.begin ? c.begin : slab.begin, c.end = c.end < slab.end ? c.end : slab.end;
    for (const Span& x : s) {
      if (x.begin >= x.end) return {0, 0, 0, 0};
    }
    const int32_t first = (s[0].begin * extent[1] + s[1].begin) * extent[2] + s[2].begin - slab.first;
    return {first, s[0].end - s[0].begin, s[1].end - s[1].begin, s[2].end - s[2].begin};
  }
  // The row of line `line` of a window, line = outer index * lines + inner index.
  int32_t line_row(const Window& w, int32_t line) const {
    return w.first + (line / w.lines * extent[1] + line % w.lines) * extent[2];
  }

 private:
  static int32_t list(const AxisEntry* axes, const int32_t begin[3], const int32_t extent[3], int32_t* token,
                      int32_t* code) {
    int32_t slot = 0;
    for (int32_t r0 = 0; r0 < extent[0]; ++r0) {
      for (int32_t r1 = 0; r1 < extent[1]; ++r1) {
        const AxisEntry &a = axes[begin[0] + r0], &b = axes[begin[1] + r1];
        for (int32_t r2 = 0; r2 < extent[2]; ++r2, ++slot) {
          const AxisEntry& c = axes[begin[2] + r2];
          token[slot] = a.token + b.token + c.token, code[slot] = a.code + b.code + c.code;
        }
      }
    }
    return slot;
  }
  // The range of others that a centre sees, at or behind the range of the centre before it.
  template <class Sees>
  static Span seen(const Span& before, int32_t extent, const Sees& sees) {
    int32_t begin = before.begin;
    while (begin < extent && !sees(begin)) ++begin;
    if (begin == extent) return {0, 0};
    int32_t end = before.end > begin + 1 ? before.end : begin + 1;
    while (end < extent && sees(end)) ++end;
    return {begin, end};
  }
};

// Where the rows of a window lie, in elements, from its first one on; kept while the shape stays.
struct Places {
  Window shape{0, 0, 0, -1};
  int32_t line_rows = 0, plane_rows = 0, row_size = 0;
  int32_t* at;

  void set(const Windows& x, const Window& w, int32_t size, int lanes) {
    if (shape.same_shape(w) && x.extent[2] == line_rows && x.extent[1] == plane_rows && size == row_size)
      return;
    const bool longer = w.outer * w.lines == 1 && shape.outer * shape.lines == 1 && size == row_size;
    int32_t n = longer ? (w.width < shape.width ? w.width : shape.width) : 0;
    shape = w, line_rows = x.extent[2], plane_rows = x.extent[1], row_size = size;
    for (int32_t line = n ? w.outer * w.lines : 0; line < w.outer * w.lines; ++line) {
      const int32_t begin = (line / w.lines * plane_rows + line % w.lines) * line_rows;
      for (int32_t i = 0; i < w.width; ++i) at[n++] = (begin + i) * size;
    }
    for (; n < w.count(); ++n) at[n] = n * size;  // one line grows
    for (; n % lanes; ++n) at[n] = 0;
  }
};

// out[slot] = values[row] for the rows of a window, line by line; writes up to a vector behind the last slot.
template <class T>
inline void gather_lines(const Windows& x, const Window& w, const T* values, T* out) {
  for (int32_t line = 0; line < w.outer * w.lines; ++line, out += w.width) {
    const T* from = values + x.line_row(w, line);
    for (int32_t i = 0; i < w.width; i += kLanes<T>) store(out + i, load(from + i));
  }
}

}  // namespace vicinal::VICINAL_ISA
