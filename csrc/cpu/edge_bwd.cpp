// Edge attention, backward: long nodes, piece by piece, and the order of it all.
#include "edge_bwd.h"

namespace vicinal::VICINAL_ISA {
namespace {

template <class S, class T>
struct LongBackward : EdgeBackward<S, T> {
  using Base = EdgeBackward<S, T>;
  using Base::a, Base::clips, Base::count, Base::first, Base::gate, Base::other, Base::x;

  explicit LongBackward(const EdgeBwd& params) : Base(params) {}

  // Of a piece and head: [0] largest score, then factor of its exponentials; [1] their sum, then delta;
  // [2] sum of exponentials times dP; then dq, or dk and dv.
  int64_t partial_size() const { return 3 + a.dim + a.dim_v; }
  T* partial(T* partials, int64_t number, int32_t h) const {
    return partials + (number * a.heads + h) * partial_size();
  }
  void first_half(const EdgeTasks& tasks, int64_t number, T* partials) {
    if (gate) return;
    const EdgeTasks::Piece piece = tasks.piece(number);
    this->set_piece(piece.first, piece.count);
    for (int32_t h = 0; h < a.heads; ++h) {
      this->begin_piece(piece.node, h, partial(partials, number, h));
      T* to = this->weights(first) + h;
      for (int32_t e = 0; e < count; ++e, to += 2 * a.heads) to[0] = x[e], to[a.heads] = other[e];
    }
  }
  void put_together(const EdgeTasks& tasks, int64_t index, int32_t h, T* partials) const {
    if (gate) return;
    const int64_t begin = tasks.first_piece(index), end = tasks.first_piece(index + 1);
    T top = partial(partials, begin, h)[0], l = 0, with_dp = 0;
    for (int64_t i = begin; i < end; ++i) {
      const T here = partial(partials, i, h)[0];
      top = here > top ? here : top;
    }
    for (int64_t i = begin; i < end; ++i) {
      T* from = partial(partials, i, h);
      from[0] = exponential<T>(splat(from[0] - top))[0];
      l += from[0] * from[1], with_dp += from[0] * from[2];
    }
    const T factor = this->settle(l, with_dp, tasks.node_of(index), h);
    for (int64_t i = begin; i < end; ++i)
      partial(partials, i, h)[0] *= factor, partial(partials, i, h)[1] = l;
  }
  void second_half(const EdgeTasks& tasks, int64_t number, T* partials) {
    const EdgeTasks::Piece piece = tasks.piece(number);
    this->set_piece(piece.first, piece.count);
    for (int32_t h = 0; h < a.heads; ++h) {
      T* found = partial(partials, number, h);
      const auto sink = [&](const auto& c, int v, Vec<T> y)
                            __attribute__((always_inline)) { c.put(found + 3, v, y); };
      if (gate) {
        this->gate_edges(piece.node, h, sink);
        continue;
      }
      if (clips) this->scores(piece.node, h, Rows{});  // raw again
      const T* from = this->weights(first) + h;
      for (int32_t e = 0; e < count; ++e, from += 2 * a.heads) x[e] = from[0], other[e] = from[a.heads];
      this->end_piece(piece.node, h, found[0], found[1], sink);
    }
  }
  // Adds up [at, at + dim) of the pieces of a long node.
  void add_pieces(const EdgeTasks& tasks, int64_t index, int32_t h, T* partials, int64_t at, int32_t dim,
                  const Rows& out) const {
    const int64_t begin = tasks.first_piece(index), end = tasks.first_piece(index + 1);
    T* sum = partial(partials, begin, h) + at;
    for (int64_t i = begin + 1; i < end; ++i) {
      const T* from = partial(partials, i, h) + at;
      for (int32_t d = 0; d < dim; ++d) sum[d] += from[d];
    }
    S* to = at_row<S>(out, tasks.node_of(index), h);
    for (int32_t d = 0; d < dim; ++d) narrow(sum[d], to + d);
  }
  void source_part(const EdgeTasks& tasks, int64_t number, T* partials) {
    const EdgeTasks::Piece piece = tasks.piece(number);
    this->set_sources(piece.first, piece.count);
    for (int32_t h = 0; h < a.heads; ++h) {
      T* to = partial(partials, number, h) + 3;
      this->sources(piece.node, h, to, to + a.dim);
    }
  }
};

template <class S, class T>
void run(const EdgeBwd& p, int threads) {
  cpu::Arena counter(nullptr);
  LongBackward<S, T> counted(p);
  counted.carve(counter);
  const Edge& a = p.a;
  const EdgeTasks by_dst(counted.numbers(a.graph.rowptr), a.graph.n_dst);
  const EdgeTasks by_src(counted.numbers(a.graph.colptr), a.graph.n_src);
  const int64_t pieces = by_dst.pieces > by_src.pieces ? by_dst.pieces : by_src.pieces;
  T* partials =
      static_cast<T*>(__builtin_malloc(sizeof(T) * (pieces * a.heads * counted.partial_size() + 1)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    LongBackward<S, T> w(p);
    cpu::Arena arena(cpu::thread_scratch(counter.used()));
    w.carve(arena);
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < by_dst.pieces; ++number) w.first_half(by_dst, number, partials);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < by_dst.longs * a.heads; ++i)
      w.put_together(by_dst, i / a.heads, static_cast<int32_t>(i % a.heads), partials);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t number = 0; number < by_dst.pieces; ++number) w.second_half(by_dst, number, partials);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < by_dst.count; ++task) {
      const int64_t end = by_dst.begin(task + 1);
      for (int64_t node = by_dst.begin(task); node < end; ++node) {
        if (!by_dst.longs || !by_dst.is_long(node)) w.whole(node);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < by_dst.longs * a.heads; ++i)
      w.add_pieces(by_dst, i / a.heads, static_cast<int32_t>(i % a.heads), partials, 3, a.dim, p.dq);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t number = 0; number < by_src.pieces; ++number) w.source_part(by_src, number, partials);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < by_src.count; ++task) {
      const int64_t end = by_src.begin(task + 1);
      for (int64_t node = by_src.begin(task); node < end; ++node) {
        if (!by_src.longs || !by_src.is_long(node)) w.whole_source(node);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < by_src.longs * a.heads; ++i) {
      const int32_t h = static_cast<int32_t>(i % a.heads);
      w.add_pieces(by_src, i / a.heads, h, partials, 3, a.dim, p.dk);
      w.add_pieces(by_src, i / a.heads, h, partials, 3 + a.dim, a.dim_v, p.dv);
    }
  }
  __builtin_free(partials);
}

}  // namespace

void edge_bwd(const EdgeBwd& p, int threads) {
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
