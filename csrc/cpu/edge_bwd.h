// Edge attention, backward, in two passes: by destination (weights, dq, gradients of edges) and by source
// (dk, dv). Between them lie p and dx of each slot and head, a row of 2 heads each; with kEdgeGate, whose
// weights are as large as the values, both passes compute them.
//
// p is computed anew and divided by its own sum, and delta is the sum of this p times dP: with a rounded
// output or lse the terms of dx would not cancel where scores are large.
#pragma once
#include "edge_block.h"

namespace vicinal::VICINAL_ISA {
template <class S, class T>
struct EdgeBackward : EdgeBlock<S, T> {
  using Base = EdgeBlock<S, T>;
  using Base::a, Base::clips, Base::col, Base::count, Base::first, Base::id, Base::kN, Base::other, Base::raw,
      Base::scale, Base::x;
  const EdgeBwd& p;
  int64_t* slot;  // of the edges of a piece by source
  const bool gate;

  explicit EdgeBackward(const EdgeBwd& params)
      : Base(params.a), p(params), gate(params.a.mode == kEdgeGate) {}

  void carve(cpu::Arena& arena) {
    Base::carve(arena);
    slot = arena.take<int64_t>(kEdgePiece);
  }
  T* weights(int64_t at) const { return static_cast<T*>(p.weights) + at * 2 * a.heads; }

  template <class C>
  Vec<T> output_grad(const C& c, int v, int64_t node, int32_t h) const {
    return c.get(at_row<S>(p.dout, node, h), v);
  }

  // ---- by destination

  void whole(int64_t node) {
    const Numbers ptr = this->numbers(a.graph.rowptr);
    this->set_piece(ptr[node], static_cast<int32_t>(ptr[node + 1] - ptr[node]));
    this->look_ahead(node + 1, p.dedge, p.dedge_k, p.dedge_mul, p.dedge_v, p.dedge_gate);
    for (int32_t h = 0; h < a.heads; ++h) {
      S* to = at_row<S>(p.dq, node, h);
      const auto sink = [&](const auto& c, int v, Vec<T> y)
                            __attribute__((always_inline)) { c.put(to, v, y); };
      if (gate) {
        gate_edges(node, h, sink);
        continue;
      }
      T found[3];
      begin_piece(node, h, found);
      const T factor = settle(found[1], found[2], node, h);
      end_piece(node, h, factor, found[1], sink);
    }
  }
  // x: exponentials, other: dP; found: top, their sum, their sum with dP.
  void begin_piece(int64_t node, int32_t h, T* found) {
    this->scores(node, h, Rows{});
    found[0] = this->largest();
    found[1] = this->exponentials(found[0]);
    const Cut<T>& cut = this->values_cut;
    if (this->more_of_values()) {
      cut.template each<2>([&](const auto& c) { value_products<true>(c, node, h); });
    } else {
      cut.each([&](const auto& c) { value_products<false>(c, node, h); });
    }
    Vec<T> sum = {};  // x is 0 beyond count, and other a product of rows
    for (int32_t e = 0; e < count; e += kN) sum += load(x + e) * load(other + e);
    found[2] = sum_lanes<T>(sum);
  }
  template <bool kMore, class C>
  void value_products(const C& c, int64_t node, int32_t h) {
    Vec<T> grad[C::kVec];
#pragma GCC unroll 4
    for (int v = 0; v < C::kVec; ++v) grad[v] = c.once(v, output_grad(c, v, node, h));
    const auto leaf = [&](int32_t e) __attribute__((always_inline)) {
      Vec<T> sum = {};
      const S* row = at_row<S>(a.v, col[e], h);
#pragma GCC unroll 4
      for (int v = 0; v < C::kVec; ++v) {
        if constexpr (kMore) {
          sum += grad[v] * this->times(c, v, a.edge_gate, id[e], h, this->bare_value(c, v, e, h));
        } else {
          sum += grad[v] * c.get(row, v);
        }
      }
      return sum;
    };
    this->sums(leaf, c.at > 0, other);
  }
  // The sum l and the sum with dP, l -> delta; returns the factor of the exponentials.
  T settle(T& l, T with_dp, int64_t node, int32_t h) const {
    const T total = a.mode == kEdgeExp ? l + T(a.eps) : l, factor = total > 0 ? 1 / total : T(0);
    l = with_dp * factor;
    if (p.dlse) l -= static_cast<const T*>(p.dlse)[node * a.heads + h];
    return factor;
  }
  template <class Sink>
  void end_piece(int64_t node, int32_t h, T factor, T delta, const Sink& sink) {
    const Vec<T> top = splat(T(a.clamp));
    for (int32_t e = 0; e < count; e += kN) {
      const Vec<T> w = load(x + e) * factor;
      Vec<T> dx = w * (load(other + e) - delta);
      if (clips) {
        const Vec<T> y = load(raw + e);
        dx = (y > top) | (y < -top) ? Vec<T>{} : dx;
      }
      store(x + e, w), store(other + e, dx);
    }
    T* to = weights(first) + h;
    for (int32_t e = 0; e < count; ++e, to += 2 * a.heads) to[0] = x[e], to[a.heads] = other[e];
    if (p.dbias) {
      T* dbias = static_cast<T*>(p.dbias) + h;
      for (int32_t e = 0; e < count; ++e) dbias[id[e] * a.heads] = other[e];
    }
    if (this->more_of_keys(p.dedge) || p.dedge_k.data) {
      this->keys_cut.template each<2>([&](const auto& c) { keys<true>(c, node, h, sink); });
    } else {
      this->keys_cut.each([&](const auto& c) { keys<false>(c, node, h, sink); });
    }
    if (p.dedge_v.data || p.dedge_gate.data)
      this->values_cut.template each<2>([&](const auto& c) { value_edges(c, node, h); });
  }
  // dq, and the gradients of what is added to keys and multiplies them.
  template <bool kMore, class C, class Sink>
  void keys(const C& c, int64_t node, int32_t h, const Sink& sink) const {
    const auto scaled = [&](const C& chunk, int v, Vec<T> y)
                            __attribute__((always_inline)) { sink(chunk, v, y * scale); };
    if constexpr (!kMore) {
      const auto row = [&](int32_t e, int v)
                           __attribute__((always_inline)) { return c.get(at_row<S>(a.k, col[e], h), v); };
      return this->weigh(c, other, row, scaled);
    }
    Vec<T> q[C::kVec], acc[C::kVec] = {};
    for (int v = 0; v < C::kVec; ++v) q[v] = c.get(at_row<S>(a.q, node, h), v) * scale;
    for (int32_t e = 0; e < count; ++e) {
#pragma GCC unroll 4
      for (int v = 0; v < C::kVec; ++v) {
        Vec<T> dt = splat(other[e]);
        if (p.dedge.data) dt += c.get(at_row<S>(p.dedge, id[e], h), v);
        acc[v] += edge_grads(c, v, e, node, h, q[v], this->key(c, v, e, h), dt, splat(x[e]));
      }
    }
    for (int v = 0; v < C::kVec; ++v) scaled(c, v, acc[v]);
  }
  // Writes dedge_k and dedge_mul; returns the edge's part of dq / scale. q comes with the scale.
  template <class C>
  Vec<T> edge_grads(const C& c, int v, int32_t e, int64_t node, int32_t h, Vec<T> q, Vec<T> key, Vec<T> dt,
                    Vec<T> weight) const {
    if (p.dedge_mul.data) c.put(at_row<S>(p.dedge_mul, id[e], h), v, dt * q * key);
    if (p.dedge_k.data) {
      Vec<T> grad = this->times(c, v, a.edge_mul, id[e], h, dt * q);
      if (a.tied) grad += this->times(c, v, a.edge_gate, id[e], h, output_grad(c, v, node, h) * weight);
      c.put(at_row<S>(p.dedge_k, id[e], h), v, grad);
    }
    return this->times(c, v, a.edge_mul, id[e], h, dt * key);
  }
  template <class C>
  void value_edges(const C& c, int64_t node, int32_t h) const {
    for (int v = 0; v < C::kVec; ++v) {
      const Vec<T> grad = output_grad(c, v, node, h);
      for (int32_t e = 0; e < count; ++e) write_value_grads(c, v, e, h, grad * x[e]);
    }
  }
  template <class C>
  void write_value_grads(const C& c, int v, int32_t e, int32_t h, Vec<T> dvalue) const {
    if (p.dedge_v.data)
      c.put(at_row<S>(p.dedge_v, id[e], h), v, this->times(c, v, a.edge_gate, id[e], h, dvalue));
    if (p.dedge_gate.data) c.put(at_row<S>(p.dedge_gate, id[e], h), v, dvalue * this->bare_value(c, v, e, h));
  }

  // ---- gate: weights per channel

  struct Gated {
    Vec<T> w, dt;  // dt without what comes from the edge output
  };
  template <class C>
  Gated gated(const C& c, int v, int64_t edge, int32_t h, Vec<T> q, Vec<T> key, Vec<T> value,
              Vec<T> grad) const {
    const Vec<T> top = splat(T(a.clamp));
    Vec<T> t = this->times(c, v, a.edge_mul, edge, h, q * key);
    if (a.bias) t += static_cast<const T*>(a.bias)[edge * a.heads + h];
    const Vec<T> w = exponential<T>(clips ? Base::clip(t, top) : t);
    const Vec<T> dt = grad * this->times(c, v, a.edge_gate, edge, h, value) * w;
    return {w, clips ? ((t > top) | (t < -top) ? Vec<T>{} : dt) : dt};
  }
  template <class Sink>
  void gate_edges(int64_t node, int32_t h, const Sink& sink) {
    for (int32_t e = 0; e < count; ++e) x[e] = 0;
    this->keys_cut.template each<2>([&](const auto& c) { gate_chunk(c, node, h, sink); });
    if (!p.dbias) return;
    T* dbias = static_cast<T*>(p.dbias) + h;
    for (int32_t e = 0; e < count; ++e) dbias[id[e] * a.heads] = x[e];
  }
  template <class C, class Sink>
  void gate_chunk(const C& c, int64_t node, int32_t h, const Sink& sink) {
    Vec<T> acc[C::kVec] = {};
    for (int32_t e = 0; e < count; ++e) {
      for (int v = 0; v < C::kVec; ++v) {
        const Vec<T> q = c.get(at_row<S>(a.q, node, h), v) * scale, grad = output_grad(c, v, node, h);
        const Vec<T> key = this->key(c, v, e, h);
        const Gated g = gated(c, v, id[e], h, q, key, this->bare_value(c, v, e, h), grad);
        if (p.dbias) x[e] += sum_lanes<T>(c.once(v, g.dt));
        const Vec<T> dt = p.dedge.data ? g.dt + c.get(at_row<S>(p.dedge, id[e], h), v) : g.dt;
        acc[v] += edge_grads(c, v, e, node, h, q, key, dt, g.w);
        write_value_grads(c, v, e, h, grad * g.w);
      }
    }
    for (int v = 0; v < C::kVec; ++v) sink(c, v, acc[v] * scale);
  }
  // ---- by source

  void set_sources(int64_t begin, int32_t n) {
    const Numbers rev = this->numbers(a.graph.rev), ids = this->numbers(a.graph.edge_id);
    first = begin, count = n, col = a.graph.rev_dst + begin;
    for (int32_t e = 0; e < n; ++e) slot[e] = rev[begin + e], id[e] = ids[slot[e]];
  }
  void whole_source(int64_t node) {
    const Numbers ptr = this->numbers(a.graph.colptr);
    set_sources(ptr[node], static_cast<int32_t>(ptr[node + 1] - ptr[node]));
    for (int32_t h = 0; h < a.heads; ++h)
      sources(node, h, at_row<S>(p.dk, node, h), at_row<S>(p.dv, node, h));
  }
  template <class Out>
  void sources(int64_t node, int32_t h, Out* dk, Out* dv) {
    if (gate)
      return this->keys_cut.template each<2>([&](const auto& c) { gate_sources(c, node, h, dk, dv); });
    for (int32_t e = 0; e < count; ++e) {
      const T* from = weights(slot[e]) + h;
      x[e] = from[0], other[e] = from[a.heads];
    }
    const auto to_k = [&](const auto& c, int v, Vec<T> y)
                          __attribute__((always_inline)) { c.put(dk, v, y * scale); };
    const auto to_v = [&](const auto& c, int v, Vec<T> y) __attribute__((always_inline)) { c.put(dv, v, y); };
    if (a.edge_mul.data || p.dedge.data) {
      this->keys_cut.template each<2>([&](const auto& c) { source_keys(c, h, to_k); });
    } else {
      this->keys_cut.each([&](const auto& c) {
        const auto row = [&](int32_t e, int v)
                             __attribute__((always_inline)) { return c.get(at_row<S>(a.q, col[e], h), v); };
        this->weigh(c, other, row, to_k);
      });
    }
    this->values_cut.each([&](const auto& c) {
      const auto row = [&](int32_t e, int v) __attribute__((always_inline)) {
        return this->times(c, v, a.edge_gate, id[e], h, output_grad(c, v, col[e], h));
      };
      this->weigh(c, x, row, to_v);
    });
  }
  template <class C, class Sink>
  void source_keys(const C& c, int32_t h, const Sink& sink) const {
    Vec<T> acc[C::kVec] = {};
    for (int32_t e = 0; e < count; ++e) {
#pragma GCC unroll 4
      for (int v = 0; v < C::kVec; ++v) {
        Vec<T> dt = splat(other[e]);
        if (p.dedge.data) dt += c.get(at_row<S>(p.dedge, id[e], h), v);
        acc[v] += this->times(c, v, a.edge_mul, id[e], h, dt * c.get(at_row<S>(a.q, col[e], h), v));
      }
    }
    for (int v = 0; v < C::kVec; ++v) sink(c, v, acc[v]);
  }
  template <class C, class Out>
  void gate_sources(const C& c, int64_t node, int32_t h, Out* dk, Out* dv) const {
    for (int v = 0; v < C::kVec; ++v) {
      const Vec<T> k = c.get(at_row<S>(a.k, node, h), v), value = c.get(at_row<S>(a.v, node, h), v);
      const Rows& more = this->added_values();
      Vec<T> of_k = {}, of_v = {};
      for (int32_t e = 0; e < count; ++e) {
        const Vec<T> q = c.get(at_row<S>(a.q, col[e], h), v) * scale, grad = output_grad(c, v, col[e], h);
        const Vec<T> key = a.edge_k.data ? k + c.get(at_row<S>(a.edge_k, id[e], h), v) : k;
        const Vec<T> bare = more.data ? value + c.get(at_row<S>(more, id[e], h), v) : value;
        const Gated g = gated(c, v, id[e], h, q, key, bare, grad);
        const Vec<T> dt = p.dedge.data ? g.dt + c.get(at_row<S>(p.dedge, id[e], h), v) : g.dt;
        of_k += this->times(c, v, a.edge_mul, id[e], h, dt * q);
        of_v += this->times(c, v, a.edge_gate, id[e], h, grad * g.w);
      }
      c.put(dk, v, of_k), c.put(dv, v, of_v);
    }
  }
};

}  // namespace vicinal::VICINAL_ISA
