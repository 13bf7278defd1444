// Edge attention, forward: a destination and head after another (edge_block.h says how they are cut).
//
// Bound by the loads of keys and values, which are read in place once for each edge: at 20,480 voxels, 27
// neighbours and heads of 16, 330 MB out of the second-level cache.
#include "edge_block.h"

namespace vicinal::VICINAL_ISA {
namespace {

template <class S, class T>
struct EdgeForward : EdgeBlock<S, T> {
  using Base = EdgeBlock<S, T>;
  using Base::a, Base::clips, Base::col, Base::count, Base::id, Base::kN, Base::scale, Base::x;
  const EdgeFwd& p;
  T* row;  // results of a head

  explicit EdgeForward(const EdgeFwd& params) : Base(params.a), p(params) {}

  void carve(cpu::Arena& arena) {
    Base::carve(arena);
    row = arena.take<T>(a.dim_v + kN);
  }
  // Of a piece and head: the largest score, the sum of exponentials, the sum of weighted values.
  int64_t partial_size() const { return a.dim_v + 2; }

  void write(const T* from, T factor, int64_t node, int32_t h) const {
    S* to = at_row<S>(p.out, node, h);
    this->values_cut.each([&](const auto& c) {
      for (int v = 0; v < c.kVec; ++v) c.put(to, v, c.get(from, v) * factor);
    });
  }
  // Divides what `from` holds by its sum l, which top was taken off, and writes it with its logarithm.
  void finish(const T* from, T top, T l, int64_t node, int32_t h) const {
    if (a.mode == kEdgeGate) return write(from, T(1), node, h);
    if (a.mode == kEdgeExp) l += T(a.eps);
    write(from, l > 0 ? 1 / l : T(0), node, h);
    const Vec<T> lse = log2(splat(l)) * T(0.693147180559945309417) + top;
    static_cast<T*>(p.lse)[node * a.heads + h] = lse[0];
  }

  void whole(int64_t node) {
    const Numbers ptr = this->numbers(a.graph.rowptr);
    this->set_piece(ptr[node], static_cast<int32_t>(ptr[node + 1] - ptr[node]));
    this->look_ahead(node + 1, p.edge);
    for (int32_t h = 0; h < a.heads; ++h) {
      T found[2];
      piece_of(node, h, found, row);
      finish(row, found[0], found[1], node, h);
    }
  }
  // found: the largest score and the sum; to: the sum of weighted values.
  void piece_of(int64_t node, int32_t h, T* found, T* to) {
    const auto sink = [&](const auto& c, int v, Vec<T> sum)
                          __attribute__((always_inline)) { c.put(to, v, sum); };
    if (a.mode == kEdgeGate) {
      found[0] = found[1] = 0;
      this->keys_cut.template each<2>([&](const auto& c) { gate(c, node, h, sink); });
      return;
    }
    this->scores(node, h, p.edge);
    found[0] = this->largest();
    found[1] = this->exponentials(found[0]);
    this->weigh_values(x, h, sink);
  }
  template <class C, class Sink>
  void gate(const C& c, int64_t node, int32_t h, const Sink& sink) {
    const S* q = at_row<S>(a.q, node, h);
    const Vec<T> top = splat(T(a.clamp));
    const T* bias = static_cast<const T*>(a.bias);
    Vec<T> qv[C::kVec], acc[C::kVec] = {};
    for (int v = 0; v < C::kVec; ++v) qv[v] = c.get(q, v) * scale;
    for (int32_t e = 0; e < count; ++e) {
      for (int v = 0; v < C::kVec; ++v) {
        Vec<T> t = this->times(c, v, a.edge_mul, id[e], h, this->key(c, v, e, h) * qv[v]);
        if (p.edge.data) c.put(at_row<S>(p.edge, id[e], h), v, t);
        if (bias) t += bias[id[e] * a.heads + h];
        const Vec<T> w = exponential<T>(clips ? Base::clip(t, top) : t);
        acc[v] += this->times(c, v, a.edge_gate, id[e], h, this->bare_value(c, v, e, h)) * w;
      }
    }
    for (int v = 0; v < C::kVec; ++v) sink(c, v, acc[v]);
  }

  void part(const EdgeTasks& tasks, int64_t number, T* partials) {
    const EdgeTasks::Piece piece = tasks.piece(number);
    this->set_piece(piece.first, piece.count);
    for (int32_t h = 0; h < a.heads; ++h) {
      T* partial = partials + (number * a.heads + h) * partial_size();
      piece_of(piece.node, h, partial, partial + 2);
    }
  }
  void put_together(const EdgeTasks& tasks, int64_t index, int32_t h, const T* partials) const {
    const int64_t begin = tasks.first_piece(index), end = tasks.first_piece(index + 1);
    const auto at = [&](int64_t i) { return partials + (i * a.heads + h) * partial_size(); };
    T top = at(begin)[0], l = 0;
    for (int64_t i = begin; i < end; ++i) top = at(i)[0] > top ? at(i)[0] : top;
    for (int32_t d = 0; d < a.dim_v; ++d) row[d] = 0;
    for (int64_t i = begin; i < end; ++i) {
      const T factor = exponential<T>(splat(at(i)[0] - top))[0];
      l += at(i)[1] * factor;
      for (int32_t d = 0; d < a.dim_v; ++d) row[d] += at(i)[2 + d] * factor;
    }
    finish(row, top, l, tasks.node_of(index), h);
  }
};

template <class S, class T>
void run(const EdgeFwd& p, int threads) {
  cpu::Arena counter(nullptr);
  EdgeForward<S, T> counted(p);
  counted.carve(counter);
  const EdgeTasks tasks(counted.numbers(p.a.graph.rowptr), p.a.graph.n_dst);
  const int64_t size = tasks.pieces * p.a.heads * counted.partial_size();
  T* partials = static_cast<T*>(__builtin_malloc(sizeof(T) * (size + 1)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    EdgeForward<S, T> w(p);
    cpu::Arena arena(cpu::thread_scratch(counter.used()));
    w.carve(arena);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t number = 0; number < tasks.pieces; ++number) w.part(tasks, number, partials);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks.count; ++task) {
      const int64_t end = tasks.begin(task + 1);
      for (int64_t node = tasks.begin(task); node < end; ++node) {
        if (!tasks.longs || !tasks.is_long(node)) w.whole(node);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tasks.longs * p.a.heads; ++i)
      w.put_together(tasks, i / p.a.heads, static_cast<int32_t>(i % p.a.heads), partials);
  }
  __builtin_free(partials);
}

}  // namespace

void edge_fwd(const EdgeFwd& p, int threads) {
  switch (p.a.dtype) {
    case kF32:
      return run<float, float>(p, threads);
    case kF64:
      return run<double, double>(p, threads);
    case kBF16:
      return run<BFloat16, float>(p, threads);
    case kF16:
      return run<Half, float>(p, threads);
  }
}

}  // namespace vicinal::VICINAL_ISA
