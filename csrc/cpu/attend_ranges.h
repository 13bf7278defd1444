// What the passes over windows.h share: packed others and centres, the terms of a score, the band at work.
//
// Lanes are the head dimension (dots.h), so a pair that is not visible costs nothing: with lanes = queries,
// tiles of 4 x 4 queries against the union of their windows of 7 x 7 would do 100 products per query for the
// 49 that count. kBand neighbours of the last axis are at work together and share the rows of others that
// they weigh. No mask, no pads, no q_scale or k_scale: neighborhoods have none.
#pragma once
#include "addresses.h"
#include "dots.h"
#include "schedule.h"
#include "weights.h"
#include "windows.h"

namespace vicinal::VICINAL_ISA {

constexpr double kToLog2 = 1.44269504088896340736, kFromLog2 = 0.69314718055994530942;

template <class S, class T>
struct Ranges {
  static constexpr int kN = kLanes<T>;
  static constexpr int64_t kSlabBytes = 512 * 1024;

  const Attend& a;
  const Plan& plan;
  const bool centres_are_keys, softmax;
  const int32_t D, Dv, Dp, Dvp;
  const int32_t group;                // query heads per key head
  const int32_t extras;               // extra keys, in the order of their slots
  const T unit;                       // scores are kept in units of log 2 for the softmax
  const int64_t slab_rows, capacity;  // others per slab: aimed at, and the most that there are
  const int64_t stride;  // of a line of slots: window, extras, each rounded up to whole vectors, and slack
  int64_t b = 0;         // of the row at work
  Windows x, coming;     // the row at work and the one after it, whose tokens are prefetched
  int64_t coming_b = -1, coming_row = -1;
  Rows other_rows[2]{}, centre_rows[2]{}, results[2]{};  // what is read of others and centres, and written
  int32_t ahead_h, ahead_at, ahead_step;
  const Windows* ahead;  // null: nothing is to be prefetched
  Slab slab{};
  Places at, at_v;
  T *rows, *rows_v;      // others [capacity][Dp], [capacity][Dvp]
  T *centre, *centre_v;  // [centres][Dp], [centres][Dvp]
  T *extra_k, *extra_v;  // [extras][Dp], [extras][Dvp]
  int32_t *extra_at, *extra_at_v;
  T* key_term;          // per other, in units of the scores
  T* table;             // bias [heads][bias_size + kN] in units of the scores; reversed for centres = keys
  T* terms;             // a line of slots
  T *s, *ds;            // [kBand][stride]
  Window now[kBand];    // of the band at work
  int32_t c0, members;  // its first centre and its number of centres

  Ranges(const Attend& attend, const Plan& rows_of, bool keys)
      : a(attend),
        plan(rows_of),
        centres_are_keys(keys),
        softmax(attend.activation == kSoftmax),
        D(attend.head_dim),
        Dv(attend.head_dim_v),
        Dp(round_up(D, kN)),
        Dvp(round_up(Dv, kN)),
        group(attend.heads / attend.kv_heads),
        extras(keys ? 0 : attend.n_extra - attend.edge_row),
        unit(softmax ? T(kToLog2) : T(1)),
        slab_rows(kSlabBytes / (int64_t(Dp + Dvp) * int64_t(sizeof(T)))),
        capacity(largest_slab(rows_of, keys, slab_rows)),
        stride(round_up(capacity, kN) + round_up(extras, kN) + 2 * kN) {}

  static int64_t largest_slab(const Plan& plan, bool keys, int64_t slab_rows) {
    int64_t most = 1;
    Windows x;
    for (int64_t r = 0; r < plan.n_rows; ++r) {
      const PlanRow& row = plan.rows[r];
      for (int a = 0; a < 3; ++a) x.extent[a] = keys ? row.q_extent[a] : row.k_extent[a];
      x.set_cut();
      const int64_t places = (x.extent[x.cut] + x.slabs(slab_rows) - 1) / x.slabs(slab_rows);
      most = at_least(most, places * x.inner());
    }
    return most;
  }

  void carve(cpu::Arena& arena) {
    const int64_t centres = centres_are_keys ? plan.k_slots : plan.q_slots,
                  others = centres_are_keys ? plan.q_slots : plan.k_slots;
    x.carve(arena, centres, others), coming.carve(arena, centres, others);
    at.at = arena.take<int32_t>(stride), at_v.at = arena.take<int32_t>(stride);
    rows = arena.take<T>(capacity * Dp), rows_v = arena.take<T>(capacity * Dvp);
    centre = arena.take<T>(centres * Dp), centre_v = arena.take<T>(centres * Dvp);
    extra_k = arena.take<T>(int64_t(extras) * Dp), extra_v = arena.take<T>(int64_t(extras) * Dvp);
    extra_at = arena.take<int32_t>(round_up(extras, kN)),
    extra_at_v = arena.take<int32_t>(round_up(extras, kN));
    key_term = arena.take<T>(a.key_bias ? others + kN : 0);
    table = arena.take<T>(a.bias ? a.heads * table_stride() : 0);
    terms = arena.take<T>(stride), s = arena.take<T>(kBand * stride), ds = arena.take<T>(kBand * stride);
  }
  int64_t table_stride() const { return a.bias_size + kN; }
  // After carve, when the memory is there.
  void start() {
    for (int32_t e = 0; e < round_up(extras, kN); ++e)
      extra_at[e] = e < extras ? e * Dp : 0, extra_at_v[e] = e < extras ? e * Dvp : 0;
    for (int32_t h = 0; a.bias && h < a.heads; ++h) {
      const T* from = static_cast<const T*>(a.bias) + h * a.bias_size;
      T* to = table + h * table_stride();
      for (int64_t i = 0; i < a.bias_size; ++i)
        to[i] = from[centres_are_keys ? a.bias_size - 1 - i : i] * unit;
      for (int32_t i = 0; i < kN; ++i) to[a.bias_size + i] = 0;
    }
  }

  // Makes `item` the row at work and the one after it, if it is before `end`, the coming one.
  void set_row(int64_t item, int64_t end) {
    const Windows last = x;
    x = coming, coming = last;
    if (coming_b != item / plan.n_rows || coming_row != item % plan.n_rows)
      x.set(plan, item % plan.n_rows, centres_are_keys);
    b = item / plan.n_rows;
    coming_b = -1;
    if (item + 1 < end) {
      coming_b = (item + 1) / plan.n_rows, coming_row = (item + 1) % plan.n_rows;
      coming.set(plan, coming_row, centres_are_keys);
    }
    set_terms();
  }
  void set_terms() {
    if (!a.key_bias || centres_are_keys) return;
    const T* bias = static_cast<const T*>(a.key_bias) + b * a.n_k;
    for (int32_t j = 0; j < x.others; ++j) key_term[j] = bias[x.other_token[j]] * unit;
  }
  // Keys whose memory may hold anything.
  bool excluded(int32_t key_token) const {
    return a.key_bias && static_cast<const T*>(a.key_bias)[b * a.n_k + key_token] == -T(__builtin_inf());
  }

  static void pack_row(const S* from, int32_t d, int32_t padded, T factor, T* to) {
    int32_t i = 0;
    for (; i + kN <= d; i += kN) store(to + i, load_as(from + i) * factor);
    if (i < padded) store(to + i, load_part<T>(from + i, d - i) * factor);
  }
  static void write_row(const T* from, T factor, S* to, int32_t d) {
    int32_t i = 0;
    for (; i + kN <= d; i += kN) store_as(to + i, load(from + i) * factor);
    if (i < d) store_part<T>(to + i, load(from + i) * factor, d - i);
  }
  static void clear(T* to, int64_t n) {
    for (int64_t i = 0; i < n; i += kN) store(to + i, Vec<T>{});
  }
  // Packs row i of n, at t's token tokens[i]. Rows lie apart, so each is asked for some rows before its turn.
  template <class Pack>
  void pack_rows(const Rows& t, int32_t h, const int32_t* tokens, int32_t n, int32_t d,
                 const Pack& pack) const {
    constexpr int32_t kEarly = 16;
    const S* base = row_of<S>(t, b, 0, h);
    for (int32_t i = 0; i < n; ++i) {
      if (i + kEarly < n) prefetch_row<0>(base + tokens[i + kEarly] * t.stride_n, d);
      pack(i, base + tokens[i] * t.stride_n);
    }
  }
  // Rows of t for the tokens; those of excluded keys are 0.
  [[gnu::noinline]] void pack_keys(const Rows& t, int32_t h, const int32_t* tokens, int32_t n, int32_t d,
                                   int32_t padded, T* to) const {
    pack_rows(t, h, tokens, n, d, [&](int32_t i, const S* from) {
      T* row = to + int64_t(i) * padded;
      excluded(tokens[i]) ? clear(row, padded) : pack_row(from, d, padded, T(1), row);
    });
  }
  // factors: per token; or null.
  [[gnu::noinline]] void pack_queries(const Rows& t, int32_t h, const int32_t* tokens, int32_t n, int32_t d,
                                      int32_t padded, T factor, const T* factors, T* to) const {
    pack_rows(t, h, tokens, n, d, [&](int32_t i, const S* from) {
      pack_row(from, d, padded, factors ? factor * factors[i] : factor, to + int64_t(i) * padded);
    });
  }
  void pack_extras(int32_t kv_head) const {
    for (int32_t e = 0; e < extras; ++e) {
      pack_row(row_of<S>(a.extra_k, b, a.edge_row + e, kv_head), D, Dp, T(1), extra_k + int64_t(e) * Dp);
      pack_row(row_of<S>(a.extra_v, b, a.edge_row + e, kv_head), Dv, Dvp, T(1), extra_v + int64_t(e) * Dvp);
    }
  }

  template <int kWrite>
  [[gnu::always_inline]] static void prefetch(const Rows& t, int64_t batch, int64_t token, int32_t h,
                                              int32_t d) {
    if (!t.data) return;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(row_of<S>(t, batch, token, h)),
                    end = begin + sizeof(S) * static_cast<uint32_t>(d);
    for (uintptr_t at = begin & ~uintptr_t(63); at < end; at += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(at), kWrite, 2);
  }
  // While head h is at work, what head h + 1 or the coming row from head h0 on reads is prefetched, and what
  // head h writes: a little per band, since a burst stalls like the loads.
  void look_ahead(int32_t h, int32_t h0, int32_t h1) {
    const bool same = h + 1 < h1;
    ahead = same || coming_b >= 0 ? (same ? &x : &coming) : nullptr;
    ahead_h = same ? h + 1 : h0, ahead_at = 0;
    const int32_t bands =
        x.centre_extent[0] * x.centre_extent[1] * ((x.centre_extent[2] + kBand - 1) / kBand);
    int32_t rows = x.centres;
    if (ahead && ahead->others > rows) rows = ahead->others;
    if (ahead && ahead->centres > rows) rows = ahead->centres;
    if (ahead && ahead->others > capacity) ahead = nullptr;  // several slabs
    ahead_step = bands ? (rows + bands - 1) / bands : 0;
  }
  [[gnu::noinline]] void step_ahead(int32_t h) {
    const int32_t begin = ahead_at, end = begin + ahead_step;
    ahead_at = end;
    const auto place = [&](bool keys, int32_t head) { return keys ? head / group : head; };
    const int32_t own = place(centres_are_keys, h);
    for (int32_t i = begin; i < end && i < x.centres; ++i) {
      prefetch<1>(results[0], b, x.token[i], own, D), prefetch<1>(results[1], b, x.token[i], own, Dv);
    }
    if (!ahead) return;
    const int64_t batch = ahead == &x ? b : coming_b;
    const int32_t of_others = place(!centres_are_keys, ahead_h),
                  of_centres = place(centres_are_keys, ahead_h);
    const bool there = ahead == &x && of_others == place(!centres_are_keys, h);
    for (int32_t i = begin; !there && i < end && i < ahead->others; ++i) {
      prefetch<0>(other_rows[0], batch, ahead->other_token[i], of_others, D);
      prefetch<0>(other_rows[1], batch, ahead->other_token[i], of_others, Dv);
    }
    for (int32_t i = begin; i < end && i < ahead->centres; ++i) {
      prefetch<0>(centre_rows[0], batch, ahead->token[i], of_centres, D);
      prefetch<0>(centre_rows[1], batch, ahead->token[i], of_centres, Dv);
    }
  }

  // Calls visit() for every band of the row.
  template <class Visit>
  void bands(const Visit& visit) {
    int32_t c = 0;
    for (int32_t i0 = 0; i0 < x.centre_extent[0]; ++i0) {
      for (int32_t i1 = 0; i1 < x.centre_extent[1]; ++i1) {
        for (int32_t i2 = 0; i2 < x.centre_extent[2]; i2 += kBand) {
          members = x.centre_extent[2] - i2 < kBand ? x.centre_extent[2] - i2 : kBand;
          for (int32_t u = 0; u < members; ++u) now[u] = x.window(i0, i1, i2 + u, slab);
          c0 = c, c += members;
          visit();
        }
      }
    }
  }
  void place(const Window& w) {
    at.set(x, w, Dp, kN);
    if (Dvp != Dp) at_v.set(x, w, Dvp, kN);
  }
  const int32_t* places_v() const { return Dvp == Dp ? at.at : at_v.at; }
  bool first_slab() const { return slab.begin == 0; }
  // Slots of a line that hold a window, and those with the extra keys behind it.
  int32_t window_slots(const Window& w) const { return round_up(w.count(), kN); }
  int32_t slots(const Window& w) const { return window_slots(w) + (first_slab() ? round_up(extras, kN) : 0); }

  // to[slot] = factor * x_row . other: of the window, and of the extra keys.
  void products(const T* x_row, const T* others, const T* extra, const int32_t* places,
                const int32_t* extra_places, int32_t padded, const Window& w, T factor, T behind,
                T* to) const {
    dots(padded / kN, x_row, others + int64_t(w.first) * padded, places, w.count(), factor, to);
    store(to + w.count(), splat(behind));
    if (!extras || !first_slab()) return;
    to += window_slots(w);
    dots(padded / kN, x_row, extra, extra_places, extras, factor, to);
    store(to + extras, splat(behind));
  }
  void add_terms(const Window& w, T* to) const {
    store(terms + w.count(), Vec<T>{});
    for (int32_t i = 0; i < w.count(); i += kN) store(to + i, load(to + i) + load(terms + i));
  }
  // The scores of member u: s, complete with every term.
  void scores(int32_t u, int32_t h) {
    const Window& w = now[u];
    T* to = s + u * stride;
    const T lowest = -T(__builtin_inf());
    place(w);
    products(centre + int64_t(c0 + u) * Dp, rows, extra_k, at.at, extra_at, Dp, w, unit, lowest, to);
    if (a.bias) {
      gather_bias(u, h);
      add_terms(w, to);
    }
    if (a.key_bias && !centres_are_keys) {
      gather_lines(x, w, key_term + slab.first, terms);
      add_terms(w, to);
    }
    for (int32_t e = 0; a.bias && first_slab() && e < extras; ++e)
      to[window_slots(w) + e] += table[h * table_stride() + a.bias_size - extras + e];
  }
  [[gnu::noinline]] void gather_bias(int32_t u, int32_t h) const {
    const Window& w = now[u];
    const T* from = table + h * table_stride();
    const int64_t end = a.bias_size - 1;
    const int32_t code = x.code[c0 + u], forward = centres_are_keys ? -1 : 1;
    T* to = terms;
    for (int32_t line = 0; line < w.outer * w.lines; ++line, to += w.width) {
      const int32_t* codes = x.other_code + slab.first + x.line_row(w, line);
      if (x.code_step == forward) {
        const int64_t at = bias_index(code, codes[0]);
        const T* begin = from + (centres_are_keys ? end - at : at);
        for (int32_t i = 0; i < w.width; i += kN) store(to + i, load(begin + i));
      } else {
        for (int32_t i = 0; i < w.width; ++i) {
          const int64_t at = bias_index(code, codes[i]);
          to[i] = from[centres_are_keys ? end - at : at];
        }
      }
    }
  }

  // The step between the windows of a full band that weigh_band can take together, or -1.
  int step() const {
    if (members != kBand || now[0].count() == 0) return -1;
    const int32_t step = now[1].first - now[0].first;
    if (step != 0 && (step != 1 || now[0].width < kBand - 1)) return -1;
    for (int32_t u = 1; u < kBand; ++u) {
      if (!now[u].same_shape(now[0]) || now[u].first != now[0].first + u * step) return -1;
    }
    return step;
  }
  // out [kBand][padded] += the weights' sums over the windows of the band.
  void weigh_windows(const T* weights, const T* others, int32_t padded, T* out) {
    const int together = step();
    if (together >= 0) {
      const Window& w = now[0];
      for (int32_t plane = 0; plane < w.outer; ++plane) {
        const int32_t row = x.line_row(w, plane * w.lines);
        const Band<T> band{others + int64_t(row) * padded, padded, x.extent[2] * padded, w.lines, w.width};
        weigh_band(padded / kN, together, band, weights + int64_t(plane) * w.lines * w.width, stride, out,
                   padded);
      }
      return;
    }
    for (int32_t u = 0; u < members; ++u) {
      place(now[u]);
      weigh(padded / kN, weights + u * stride, others + int64_t(now[u].first) * padded,
            padded == Dp ? at.at : at_v.at, now[u].count(), out + int64_t(u) * padded);
    }
  }

  // What dropout multiplies the slots of member u by, into terms.
  [[gnu::noinline]] void keep(int32_t u, int32_t h) const {
    const Window& w = now[u];
    const uint32_t limit = dropout_threshold(a.dropout_p);
    const T kept = T(1 / (1 - a.dropout_p));
    const uint32_t bh = static_cast<uint32_t>(b * a.head_total + a.head_offset + h);
    const uint64_t seed = static_cast<uint64_t>(*a.seed);
    const int32_t own = x.token[c0 + u];
    int64_t last = -1;
    Philox4 words{};
    const auto draw = [&](int64_t slot, int32_t query) {
      const int64_t which = slot / 4 * (int64_t(a.n_q) + 1) + query;
      if (which != last)
        words = dropout_words(seed, static_cast<uint32_t>(slot / 4), static_cast<uint32_t>(query), bh);
      last = which;
      return words.x[slot % 4] >= limit ? kept : T(0);
    };
    T* to = terms;
    for (int32_t line = 0; line < w.outer * w.lines; ++line) {
      const int32_t row = slab.first + x.line_row(w, line);
      for (int32_t i = 0; i < w.width; ++i) {
        const int32_t other = x.other_token[row + i];
        const int32_t key = centres_are_keys ? own : other;
        *to++ = draw(a.drop_by_token ? key : row + i, centres_are_keys ? other : own);
      }
    }
    to = terms + window_slots(w);
    const int64_t first = a.drop_by_token ? a.n_k + a.edge_row : x.others;
    for (int32_t e = 0; first_slab() && e < extras; ++e) to[e] = draw(first + e, own);
  }
  // Slots of member u times keep.
  void drop(int32_t u, T* to) const {
    const Window& w = now[u];
    for (int32_t i = 0; i < w.count(); ++i) to[i] *= terms[i];
    const int32_t begin = window_slots(w);
    for (int32_t e = begin; e < begin + (first_slab() ? extras : 0); ++e) to[e] *= terms[e];
  }
};

inline bool sees_parts(const Attend& a) { return a.plan.guard != 0; }

}  // namespace vicinal::VICINAL_ISA
