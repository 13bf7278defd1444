// What the passes of edge attention share: the chunks of a head, the edges at work, their scores and weights.
//
// Lanes are the head dimension, in place and of any strides; scores of kLanes edges are added up by one tree
// (dots.h). A last vector that is not whole overlaps the one before it, so that nothing is read or written
// outside of a row, no lane is masked in memory, and a row of 10 costs as much as one of 16.
//
// A node's edges are cut into pieces of kEdgePiece. Almost every node is one piece, and then nothing leaves
// the registers and the first-level cache; of others ("long" nodes) any thread takes any piece, and what the
// pieces found is put together in their order. So results do not depend on the number of threads.
#pragma once
#include "dots.h"
#include "edge.h"
#include "memory.h"

namespace vicinal::VICINAL_ISA {

constexpr int32_t kEdgePiece = 512;  // longer sums also round more

// kVec vectors of a row of a head, from element `at` on, the last one at element `last`. kPart: the row is
// shorter than a vector, and `part` long.
template <class T, int kVectors, bool kPart>
struct Chunk {
  static constexpr int kVec = kVectors, kN = kLanes<T>;
  int32_t at, last, part;
  Vec<T> fresh;  // 1 in the lanes of the last vector that the vector before does not have, else 0

  int32_t place(int v) const { return v == kVec - 1 ? last : at + v * kN; }
  template <class S>
  Vec<T> get(const S* row, int v) const {
    if constexpr (kPart) return load_part<T>(row, part);
    return load_as(row + place(v));
  }
  template <class S>
  void put(S* row, int v, Vec<T> x) const {
    if constexpr (kPart) return store_part<T>(row, x, part);
    store_as(row + place(v), x);
  }
  // The sum over the chunk counts each element once.
  Vec<T> once(int v, Vec<T> x) const { return v == kVec - 1 && !kPart ? x * fresh : x; }
};

// How a row of `dim` elements is cut: made once for a call, because lanes of `fresh` are set one by one.
template <class T>
struct Cut {
  static constexpr int kN = kLanes<T>;
  int32_t dim;
  Vec<T> fresh;

  explicit Cut(int32_t size) : dim(size) {
    const int32_t even = (dim - 1) / kN * kN, last = dim < even + kN ? dim - kN : even;
    for (int i = 0; i < kN; ++i) fresh[i] = dim < kN || last + i >= even ? T(1) : T(0);
  }

  // f(chunk) for each chunk.
  template <int kMost = 4, class F>
  [[gnu::always_inline]] void each(const F& f) const {
    if (dim < kN) return f(Chunk<T, 1, true>{0, 0, dim, fresh});
    for (int32_t at = 0; at < dim; at += kMost * kN) {
      const int32_t left = dim - at, vectors = left < kMost * kN ? (left + kN - 1) / kN : kMost;
      const int32_t even = at + (vectors - 1) * kN, last = even + kN > dim ? dim - kN : even;
      const Vec<T> lanes = at + vectors * kN < dim ? splat(T(1)) : fresh;
      if (vectors == 1) f(Chunk<T, 1, false>{at, last, kN, lanes});
      if (vectors == 2) f(Chunk<T, 2, false>{at, last, kN, lanes});
      if constexpr (kMost > 2) {
        if (vectors == 3) f(Chunk<T, 3, false>{at, last, kN, lanes});
        if (vectors == 4) f(Chunk<T, 4, false>{at, last, kN, lanes});
      }
    }
  }
};

template <class T, class I, I... i>
Ints<T> lane_numbers(std::integer_sequence<I, i...>) {
  return Ints<T>{i...};
}
// x in the first n lanes, 0 in the others.
template <class T>
Vec<T> first_lanes(Vec<T> x, int64_t n) {
  using Number = std::remove_reference_t<decltype(Ints<T>{}[0])>;
  const Ints<T> lane = lane_numbers<T>(std::make_integer_sequence<Number, kLanes<T>>());
  return lane < static_cast<Number>(n < kLanes<T> ? n : kLanes<T>) ? x : Vec<T>{};
}

// e^x: infinite from where the type is, which exp2 leaves undefined.
template <class T>
Vec<T> exponential(Vec<T> x) {
  constexpr double kLog2E = 1.4426950408889634074, kTop = sizeof(T) == 4 ? 127.99 : 1023;
  const Vec<T> y = x * T(kLog2E);
  return y > splat(T(kTop)) ? splat(T(__builtin_inf())) : exp2(y);
}

// Rows of edge tensors, or of what is written for each edge.
template <class S>
S* at_row(const Rows& t, int64_t n, int32_t h) {
  return static_cast<S*>(t.data) + n * t.stride_n + h * t.stride_h;
}

// Slot numbers of a graph.
struct Numbers {
  const void* data;
  bool wide;
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

template <class S, class T>
struct EdgeBlock {
  static constexpr int kN = kLanes<T>;

  const Edge& a;
  const Cut<T> keys_cut, values_cut;
  const T scale;
  const bool clips;
  T *x, *raw, *other;  // of the edges of a piece: scores then weights; scores before the clip; dP then dx
  int64_t* id;         // rows of edge tensors
  // The piece at work.
  int64_t first = 0;  // slot
  int32_t count = 0;
  const int32_t* col = nullptr;

  explicit EdgeBlock(const Edge& edge)
      : a(edge), keys_cut(edge.dim), values_cut(edge.dim_v), scale(T(edge.scale)), clips(edge.clamp >= 0) {}

  void carve(cpu::Arena& arena) {
    x = arena.take<T>(kEdgePiece + kN), raw = arena.take<T>(kEdgePiece + kN);
    other = arena.take<T>(kEdgePiece + kN), id = arena.take<int64_t>(kEdgePiece);
  }
  Numbers numbers(const void* data) const { return {data, a.graph.wide != 0}; }
  bool more_of_keys(const Rows& edge) const { return a.edge_k.data || a.edge_mul.data || edge.data; }
  bool more_of_values() const { return a.edge_v.data || a.edge_gate.data || a.tied; }
  const Rows& added_values() const { return a.tied ? a.edge_k : a.edge_v; }

  // Brings the rows of a node's edges nearer while the node before it is at work: they lie anywhere.
  template <class... Written>
  void look_ahead(int64_t node, const Written&... written) const {
    constexpr int64_t kMostAhead = 64;
    const Numbers ptr = numbers(a.graph.rowptr), ids = numbers(a.graph.edge_id);
    if (node >= a.graph.n_dst) return;
    const int64_t begin = ptr[node],
                  end = ptr[node + 1] - begin > kMostAhead ? begin + kMostAhead : ptr[node + 1];
    for (int64_t e = begin; e < end; ++e) {
      const int64_t row = ids[e];
      ahead<0>(a.k, a.graph.col[e], a.dim), ahead<0>(a.v, a.graph.col[e], a.dim_v);
      ahead<0>(a.edge_k, row, a.dim), ahead<0>(a.edge_mul, row, a.dim);
      ahead<0>(a.edge_v, row, a.dim_v), ahead<0>(a.edge_gate, row, a.dim_v);
      (ahead<1>(written, row, a.dim), ...);
    }
  }
  template <int kWrite>
  void ahead(const Rows& t, int64_t row, int32_t dim) const {
    if (!t.data) return;
    const char* from = reinterpret_cast<const char*>(at_row<S>(t, row, 0));
    const int64_t bytes = ((a.heads - 1) * t.stride_h + dim) * static_cast<int64_t>(sizeof(S));
    if (bytes > 4096) return;  // heads apart from each other, or rows so long that they come by themselves
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, kWrite, 2);
  }

  void set_piece(int64_t begin, int32_t n) {
    first = begin, count = n, col = a.graph.col + begin;
    const Numbers ids = numbers(a.graph.edge_id);
    for (int32_t e = 0; e < n; ++e) id[e] = ids[begin + e];
  }

  template <class C>
  Vec<T> key(const C& c, int v, int32_t e, int32_t h) const {
    const Vec<T> k = c.get(at_row<S>(a.k, col[e], h), v);
    return a.edge_k.data ? k + c.get(at_row<S>(a.edge_k, id[e], h), v) : k;
  }
  template <class C>
  Vec<T> times(const C& c, int v, const Rows& factor, int64_t row, int32_t h, Vec<T> y) const {
    return factor.data ? y * c.get(at_row<S>(factor, row, h), v) : y;
  }
  // v + edge_v
  template <class C>
  Vec<T> bare_value(const C& c, int v, int32_t e, int32_t h) const {
    const Vec<T> y = c.get(at_row<S>(a.v, col[e], h), v);
    const Rows& more = added_values();
    return more.data ? y + c.get(at_row<S>(more, id[e], h), v) : y;
  }

  // to[e] = sum over a head of leaf(e), a vector, for the edges of the piece; kAdd: + to[e].
  template <class Leaf>
  void sums(const Leaf& leaf, bool add, T* to) const {
    int32_t i = 0;
    for (; i + kN <= count; i += kN) {
      const Vec<T> s = sum_tree<T>([&](int u) __attribute__((always_inline)) { return leaf(i + u); }, kN);
      store(to + i, add ? s + load(to + i) : s);
    }
    if (i == count) return;
    const int32_t last = count - 1;
    const auto clamped = [&](int u)
                             __attribute__((always_inline)) { return leaf(i + u < last ? i + u : last); };
    const Vec<T> s = sum_tree<T>(clamped, count - i);
    store(to + i, add ? s + load(to + i) : s);
  }

  // x = sum_c t + bias, clipped; raw too where it is clipped. Writes t to `edge` where that is wanted.
  void scores(int64_t node, int32_t h, const Rows& edge) {
    const S* q = at_row<S>(a.q, node, h);
    const bool more = more_of_keys(edge);
    if (more) keys_cut.template each<2>([&](const auto& c) { scores_of<true>(c, q, h, edge); });
    if (!more) keys_cut.each([&](const auto& c) { scores_of<false>(c, q, h, edge); });
    if (a.bias) {
      const T* bias = static_cast<const T*>(a.bias) + h;
      for (int32_t e = 0; e < count; ++e) x[e] += bias[id[e] * a.heads];
    }
    if (!clips) return;
    const Vec<T> top = splat(T(a.clamp));
    for (int32_t e = 0; e < count; e += kN) {
      const Vec<T> y = load(x + e);
      store(raw + e, y), store(x + e, clip(y, top));
    }
  }
  static Vec<T> clip(Vec<T> y, Vec<T> top) {
    const Vec<T> low = y < -top ? -top : y;
    return low > top ? top : low;
  }
  template <bool kMore, class C>
  void scores_of(const C& c, const S* q, int32_t h, const Rows& edge) {
    Vec<T> qv[C::kVec];
#pragma GCC unroll 4
    for (int v = 0; v < C::kVec; ++v) qv[v] = c.get(q, v) * scale;
    if constexpr (!kMore) qv[C::kVec - 1] = c.once(C::kVec - 1, qv[C::kVec - 1]);
    const auto leaf = [&](int32_t e) __attribute__((always_inline)) {
      Vec<T> sum = {};
      const S* k = at_row<S>(a.k, col[e], h);
#pragma GCC unroll 4
      for (int v = 0; v < C::kVec; ++v) {
        if constexpr (kMore) {
          const Vec<T> t = times(c, v, a.edge_mul, id[e], h, key(c, v, e, h) * qv[v]);
          if (edge.data) c.put(at_row<S>(edge, id[e], h), v, t);
          sum += c.once(v, t);
        } else {
          sum += c.get(k, v) * qv[v];
        }
      }
      return sum;
    };
    sums(leaf, c.at > 0, x);
  }

  // x -> exp(x - top), with zeros up to a whole vector; returns the sum.
  T exponentials(T top) {
    Vec<T> total = {};
    for (int32_t e = 0; e < count; e += kN) {
      const Vec<T> p = first_lanes<T>(exponential<T>(load(x + e) - top), count - e);
      store(x + e, p), total += p;
    }
    return sum_lanes<T>(total);
  }
  // What is taken off the scores before exp: their largest, or 0 with kEdgeExp and where none is finite.
  T largest() const {
    if (a.mode == kEdgeExp || !count) return T(0);
    T most = x[0];
    int32_t e = 0;
    if (count >= kN) {
      Vec<T> top = load(x);
      for (e = kN; e + kN <= count; e += kN) top = maximum(top, load(x + e));
      most = most_across<T>(top)[0];
    }
    for (; e < count; ++e) most = x[e] > most ? x[e] : most;
    return most > -T(__builtin_inf()) ? most : T(0);
  }

  // sink(chunk, v, sum_e weights[e] value_e)
  template <class Sink>
  void weigh_values(const T* weights, int32_t h, const Sink& sink) const {
    if (more_of_values()) {
      values_cut.template each<2>([&](const auto& c) {
        const auto row = [&](int32_t e, int v) __attribute__((always_inline)) {
          return times(c, v, a.edge_gate, id[e], h, bare_value(c, v, e, h));
        };
        weigh(c, weights, row, sink);
      });
      return;
    }
    values_cut.each([&](const auto& c) {
      const auto row = [&](int32_t e, int v)
                           __attribute__((always_inline)) { return c.get(at_row<S>(a.v, col[e], h), v); };
      weigh(c, weights, row, sink);
    });
  }
  // sink(c, v, sum_e weights[e] row(e, v)): several chains, since an addition takes four cycles.
  template <class C, class Row, class Sink>
  void weigh(const C& c, const T* weights, const Row& row, const Sink& sink) const {
    constexpr int chains = C::kVec > 2 ? 2 : 4;
    Vec<T> acc[chains][C::kVec] = {};
    int32_t e = 0;
    for (; e + chains <= count; e += chains) {
#pragma GCC unroll 4
      for (int u = 0; u < chains; ++u) {
#pragma GCC unroll 4
        for (int v = 0; v < C::kVec; ++v) acc[u][v] += row(e + u, v) * weights[e + u];
      }
    }
    for (; e < count; ++e) {
#pragma GCC unroll 4
      for (int v = 0; v < C::kVec; ++v) acc[0][v] += row(e, v) * weights[e];
    }
#pragma GCC unroll 4
    for (int v = 0; v < C::kVec; ++v) {
      if constexpr (chains == 4) {
        sink(c, v, (acc[0][v] + acc[1][v]) + (acc[2][v] + acc[3][v]));
      } else {
        sink(c, v, acc[0][v] + acc[1][v]);
      }
    }
  }
};

// Nodes of one pass: runs of nodes of about the same work, and the pieces of long nodes.
class EdgeTasks {
 public:
  EdgeTasks(Numbers ptr, int64_t nodes) : ptr_(ptr), nodes_(nodes) {
    const int64_t total = weight(nodes);
    count = total / 2048 < 1 ? 1 : total / 2048 > 512 ? 512 : total / 2048;
    if (ptr[nodes] <= kEdgePiece) return;
    for (int64_t i = 0; i < nodes; ++i) {
      if (is_long(i)) ++longs, pieces += pieces_of(i);
    }
    if (!longs) return;
    table_ = static_cast<int64_t*>(__builtin_malloc(sizeof(int64_t) * (2 * longs + 1 + pieces)));
    int64_t at = 0, piece = 0;
    for (int64_t i = 0; i < nodes; ++i) {
      if (!is_long(i)) continue;
      table_[at] = i, table_[longs + at] = piece;
      for (int64_t end = piece + pieces_of(i); piece < end; ++piece) table_[2 * longs + 1 + piece] = at;
      ++at;
    }
    table_[2 * longs] = pieces;
  }
  ~EdgeTasks() { __builtin_free(table_); }
  EdgeTasks(const EdgeTasks&) = delete;
  EdgeTasks& operator=(const EdgeTasks&) = delete;

  int64_t count = 1, longs = 0, pieces = 0;

  // Task t has the nodes begin(t) .. begin(t + 1) - 1.
  int64_t begin(int64_t task) const {
    if (task >= count) return nodes_;
    const int64_t wanted = weight(nodes_) / count * task;
    int64_t low = 0, high = nodes_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      weight(middle) < wanted ? low = middle + 1 : high = middle;
    }
    return low;
  }
  bool is_long(int64_t node) const { return ptr_[node + 1] - ptr_[node] > kEdgePiece; }
  int64_t pieces_of(int64_t node) const {
    return (ptr_[node + 1] - ptr_[node] + kEdgePiece - 1) / kEdgePiece;
  }
  int64_t node_of(int64_t index) const { return table_[index]; }  // of a long node
  int64_t first_piece(int64_t index) const { return table_[longs + index]; }
  int64_t owner(int64_t piece) const { return table_[2 * longs + 1 + piece]; }  // index of its long node

  struct Piece {
    int64_t node, first;  // slot
    int32_t count;
  };
  Piece piece(int64_t number) const {
    const int64_t index = owner(number), node = node_of(index);
    const int64_t first = ptr_[node] + (number - first_piece(index)) * kEdgePiece,
                  left = ptr_[node + 1] - first;
    return {node, first, static_cast<int32_t>(left < kEdgePiece ? left : kEdgePiece)};
  }

 private:
  int64_t weight(int64_t node) const { return ptr_[node] + 4 * node; }
  Numbers ptr_;
  int64_t nodes_;
  int64_t* table_ = nullptr;
};

}  // namespace vicinal::VICINAL_ISA
