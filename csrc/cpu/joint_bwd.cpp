// joint attention, backward: the gradient of the linear memory, then per group everything else.
//
// Weights are recomputed. A group owns the gradients of its tokens; the bias gradient goes through one
// partial per run of groups, added in the order of the runs. With a gate the gradients of O_v and O_u are
// made from the incoming one where they are packed, twice, instead of being stored.
#include <cstdlib>

#include "joint_block.h"
#include "joint_state.h"

namespace vicinal::VICINAL_ISA {
namespace {

// Values at one vector of columns of a gated result, and what its backward needs of them.
template <class S, class T>
struct Gate {
  Vec<T> dy, v, u, of_v, of_u, t;

  Gate(const JointBwd& p, int64_t b, int64_t token, int32_t column, int32_t left) {
    const auto at = [&](const Matrix& m) { return load_lanes<S, T>(row_in<S>(m, b, token) + column, left); };
    dy = at(p.dout), v = at(p.a.v), u = at(p.a.u), of_v = at(p.inner_v), of_u = at(p.inner_u);
    t = sigmoid<T>(of_v * u);
  }
  Vec<T> slope() const { return dy * of_u * v * t * (T(1) - t); }  // by the argument of the sigmoid
};

template <class S, class T>
struct JointBackward : JointBlock<S, T> {
  using Base = JointBlock<S, T>;
  using Base::a, Base::b, Base::begin, Base::d, Base::dp, Base::g, Base::gp, Base::kN, Base::rows,
      Base::weights, Base::scores, Base::ignored;
  const JointBwd& p;
  StateScratch<T> state_scratch;
  T *lin_k, *dlin_q, *dlin_k;           // [g][dp]
  T* pairs;                             // gradient of the weights, then of the scores [g][gp]
  T *dout, *values, *dvalues;           // of the tile [g][lanes]
  T *columns, *states, *state_columns;  // [lanes][gp], [dim][lanes], [lanes][dp]

  explicit JointBackward(const JointBwd& params) : Base(params.a), p(params) {}

  void carve(cpu::Arena& arena) {
    Base::carve(arena, true);
    state_scratch.carve(arena, a);
    const int64_t lanes = 2 * kTileLanes<T>;
    lin_k = arena.take<T>(int64_t(g) * dp);
    dlin_q = arena.take<T>(int64_t(g) * dp), dlin_k = arena.take<T>(int64_t(g) * dp);
    pairs = arena.take<T>(int64_t(g) * gp);
    dout = arena.take<T>(g * lanes), values = arena.take<T>(g * lanes), dvalues = arena.take<T>(g * lanes);
    columns = arena.take<T>(lanes * gp), states = arena.take<T>(int64_t(d) * lanes);
    state_columns = arena.take<T>(lanes * dp);
  }

  // Gradients of the columns of O -> [count][tile lanes].
  void pack_dout(const Tile& t, int64_t first, int32_t count, T* to) const {
    for (int32_t i = 0; i < count; ++i, to += t.lanes) {
      if (a.gate) {
        const int32_t half = t.segment[1].at;
        for (int32_t c = 0; c < t.segment[0].count; c += kN) {
          const Gate<S, T> x(p, b, first + i, t.segment[0].first + c, t.segment[0].count - c);
          store(to + c, x.slope() * x.u), store(to + half + c, x.dy * x.v * x.t);
        }
        continue;
      }
      for (int32_t x = 0; x < t.segments(); ++x) {
        const Segment& s = t.segment[x];
        const Matrix& m = s.part ? p.dother : p.dout;
        const S* from = m.data ? row_in<S>(m, b, first + i) + s.first : nullptr;
        for (int32_t c = 0; c < s.count; c += kN)
          store(to + s.at + c, from ? load_lanes<S, T>(from + c, s.count - c) : Vec<T>{});
      }
    }
  }

  void state(int64_t batch, int32_t index) {
    b = batch;
    T* states_of_b = static_cast<T*>(p.dstate) + b * a.states() * d * a.width();
    sum_states(*this, state_scratch, a.lin_q, false, true, T(a.lin_scale), Base::tile(a, index), states_of_b,
               [this](const Tile& t, int64_t first, int32_t count, const uint8_t*, T* to) {
                 pack_dout(t, first, count, to);
               });
  }

  void group(int64_t batch, int64_t index, T* bias_sum) {
    this->set_group(batch, index);
    this->make_weights();
    this->pack_rows(a.lin_k, begin, rows, T(1), ignored, lin_k);
    const int64_t which = (b * a.states() + (a.causal ? index : 0)) * d * a.width();
    const T* state = static_cast<const T*>(p.state) + which;
    const T* dstate = static_cast<const T*>(p.dstate) + which;
    for (int32_t i = 0; i < Base::tiles(a); ++i) tile(Base::tile(a, i), state, dstate, i == 0);
    score_gradients(bias_sum);
    write_rows(dlin_q, T(a.lin_scale), p.dlin_q), write_rows(dlin_k, T(1), p.dlin_k);
    const int32_t vectors = dp / kN;
    gemm_rows(Gemm<T>{pairs, gp, this->k, dp, nullptr, 0, dlin_q, dp, nullptr}, rows, rows, vectors);
    write_rows(dlin_q, T(a.quad_scale), p.dquad_q);
    gemm_columns(Gemm<T>{pairs, gp, this->q, dp, nullptr, 0, dlin_k, dp, nullptr}, rows, rows, vectors);
    write_rows(dlin_k, T(1), p.dquad_k);  // q has the scale already
  }

  void tile(const Tile& t, const T* state, const T* dstate, bool first) {
    const int32_t wide = round_up(rows, kN) / kN, vectors = t.lanes / kN;
    pack_dout(t, begin, rows, dout);
    this->pack_tile(t, begin, rows, ignored, values);
    Base::transposed(values, rows, t.lanes, t.lanes, gp, columns);
    gemm_rows(Gemm<T>{dout, t.lanes, columns, gp, first ? nullptr : pairs, gp, pairs, gp, nullptr}, rows,
              t.lanes, wide);
    this->pack_state(state, t, states);
    Base::transposed(states, d, t.lanes, t.lanes, dp, state_columns);
    gemm_rows(Gemm<T>{dout, t.lanes, state_columns, dp, first ? nullptr : dlin_q, dp, dlin_q, dp, nullptr},
              rows, t.lanes, dp / kN);
    this->pack_state(dstate, t, states);
    Base::transposed(states, d, t.lanes, t.lanes, dp, state_columns);
    gemm_rows(Gemm<T>{values, t.lanes, state_columns, dp, first ? nullptr : dlin_k, dp, dlin_k, dp, nullptr},
              rows, t.lanes, dp / kN);
    value_gradients(t, vectors);
    write_values(t);
  }
  // dvalues = weights^T dO + lin_k dstate; a causal key is seen by the queries from its own on.
  void value_gradients(const Tile& t, int32_t vectors) {
    const int32_t step = a.causal ? 4 * kN : rows;
    for (int32_t j = 0; j < rows; j += step) {
      const int32_t keys = j + step < rows ? step : rows - j, from = a.causal ? j : 0;
      gemm_columns(Gemm<T>{weights + int64_t(from) * gp + j, gp, dout + int64_t(from) * t.lanes, t.lanes,
                           nullptr, 0, dvalues + int64_t(j) * t.lanes, t.lanes, nullptr},
                   keys, rows - from, vectors);
    }
    gemm_rows(Gemm<T>{lin_k, dp, states, t.lanes, dvalues, t.lanes, dvalues, t.lanes, nullptr}, rows, d,
              vectors);
  }
  void write_values(const Tile& t) const {
    const int32_t half = t.segment[1].at;
    for (int32_t i = 0; i < rows; ++i) {
      const T* from = dvalues + int64_t(i) * t.lanes;
      const bool zero = this->is_ignored(i);
      for (int32_t x = 0; x < (a.gate ? 1 : t.segments()); ++x) {
        const Segment& s = t.segment[x];
        S* to = row_to<S>(s.part ? p.du : p.dv, b, begin + i) + s.first;
        S* to_u = a.gate ? row_to<S>(p.du, b, begin + i) + s.first : nullptr;
        for (int32_t c = 0; c < s.count; c += kN) {
          const int32_t left = s.count - c;
          Vec<T> grad = zero ? Vec<T>{} : load(from + s.at + c);
          if (a.gate) {
            const Gate<S, T> gate(p, b, begin + i, s.first + c, left);
            grad += gate.dy * gate.of_u * gate.t;
            const Vec<T> grad_u = zero ? Vec<T>{} : load(from + half + c);
            store_lanes<S, T>(to_u + c, grad_u + gate.slope() * gate.of_v, left);
          }
          store_lanes<S, T>(to + c, grad, left);
        }
      }
    }
  }

  // pairs: from the gradient of the weights to that of the scores, which is added to bias_sum [g][gp].
  void score_gradients(T* bias_sum) {
    this->restrict_pairs(pairs);
    for (int32_t i = 0; i < rows; ++i) {
      T* row = pairs + int64_t(i) * gp;
      const T* score = scores + int64_t(i) * gp;
      for (int32_t j = 0; j < rows; j += kN) {
        const Vec<T> ds = load(row + j) * joint_slope<T>(a.activation, load(score + j));
        store(row + j, ds);
        if (bias_sum) store(bias_sum + int64_t(i) * gp + j, load(bias_sum + int64_t(i) * gp + j) + ds);
      }
    }
  }
  void write_rows(const T* from, T factor, const Matrix& m) const {
    for (int32_t i = 0; i < rows; ++i, from += dp) {
      S* to = row_to<S>(m, b, begin + i);
      for (int32_t c = 0; c < d; c += kN) store_lanes<S, T>(to + c, load(from + c) * factor, d - c);
    }
  }
};

// Runs of groups, whose bias gradients are added up one by one and then in the order of the runs.
struct Runs {
  int64_t tasks, size;

  explicit Runs(int64_t all) : tasks(all), size((all + kMost - 1) / kMost) {
    if (size < 1) size = 1;
  }
  int64_t count() const { return (tasks + size - 1) / size; }
  static constexpr int64_t kMost = 32;
};

template <class T>
void add_bias(const JointBwd& p, const Runs& runs, const T* partials, int32_t g, int32_t gp) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < p.a.group; ++i) {
    T* to = static_cast<T*>(p.dbias) + i * p.a.group;
    for (int64_t j = 0; j < p.a.group; ++j) {
      T sum = 0;
      for (int64_t run = 0; run < runs.count() && i < g && j < g; ++run)
        sum += partials[(run * g + i) * gp + j];
      to[j] = sum;
    }
  }
}

template <class S, class T>
void run(const JointBwd& p, int threads) {
  cpu::Arena counter(nullptr);
  JointBackward<S, T> counted(p);
  counted.carve(counter);
  const int64_t tiles = JointBackward<S, T>::tiles(p.a), groups = p.a.groups();
  const Runs runs(p.a.batch * groups);
  const int64_t size = int64_t(counted.g) * counted.gp;
  T* partials = nullptr;
  if (p.dbias &&
      !(partials = static_cast<T*>(std::calloc(static_cast<size_t>(runs.count() * size + 1), sizeof(T)))))
    std::abort();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    JointBackward<S, T> w(p);
    cpu::Arena arena(cpu::thread_scratch(counter.used()));
    w.carve(arena);
    w.expand_bias();
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.a.batch * tiles; ++task)
      w.state(task / tiles, static_cast<int32_t>(task % tiles));
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < runs.count(); ++index) {
      const int64_t end = (index + 1) * runs.size < runs.tasks ? (index + 1) * runs.size : runs.tasks;
      for (int64_t task = index * runs.size; task < end; ++task)
        w.group(task / groups, task % groups, partials ? partials + index * size : nullptr);
    }
    if (partials) add_bias(p, runs, partials, counted.g, counted.gp);
  }
  std::free(partials);
}

}  // namespace

void joint_bwd(const JointBwd& p, int threads) {
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
