// joint attention, forward: the linear memory, then per group its weights against all columns of W.
//
// Of n = 4000 tokens, dim 128 and 2 x 1024 columns, float32: 8.6 GFLOP, of which the scores are 3 %, and 100
// MB of W read twice and results written once.
#include "joint_block.h"
#include "joint_state.h"

namespace vicinal::VICINAL_ISA {
namespace {

template <class S, class T>
struct JointForward : JointBlock<S, T> {
  using Base = JointBlock<S, T>;
  using Base::a, Base::b, Base::begin, Base::d, Base::dp, Base::g, Base::gp, Base::kN, Base::rows,
      Base::weights;
  const JointFwd& p;
  StateScratch<T> state_scratch;
  T *lin, *tile_rows, *tile_state, *sum;  // [g][dp], [g][lanes], [dim][lanes], [g][lanes]
  Tile now, next;
  int32_t ahead_row, ahead_step;
  const Ahead ahead{&JointForward::step_ahead, this};

  explicit JointForward(const JointFwd& params) : Base(params.a), p(params) {}

  void carve(cpu::Arena& arena) {
    Base::carve(arena, false);
    state_scratch.carve(arena, a);
    const int32_t lanes = 2 * kTileLanes<T>;
    lin = arena.take<T>(int64_t(g) * dp), tile_rows = arena.take<T>(int64_t(g) * lanes);
    tile_state = arena.take<T>(int64_t(d) * lanes), sum = arena.take<T>(int64_t(g) * lanes);
  }

  void state(int64_t batch, int32_t index) {
    b = batch;
    T* states = static_cast<T*>(p.state) + b * a.states() * d * a.width();
    sum_states(*this, state_scratch, a.lin_k, true, false, T(1), Base::tile(a, index), states,
               [this](const Tile& t, int64_t first, int32_t count, const uint8_t* skip, T* to) {
                 this->pack_tile(t, first, count, skip, to);
               });
  }

  void group(int64_t batch, int64_t index) {
    this->set_group(batch, index);
    this->make_weights();
    this->pack_rows(a.lin_q, begin, rows, T(a.lin_scale), nullptr, lin);
    const int64_t which = b * a.states() + (a.causal ? index : 0);
    const T* state = static_cast<const T*>(p.state) + which * d * a.width();
    const int32_t tiles = Base::tiles(a);
    for (int32_t i = 0; i < tiles; ++i) {
      now = Base::tile(a, i), next = Base::tile(a, i + 1 < tiles ? i + 1 : i);
      this->pack_tile(now, begin, rows, this->ignored, tile_rows);
      this->pack_state(state, now, tile_state);
      look_ahead();
      const int32_t vectors = now.lanes / kN;
      multiply_weights(vectors);
      gemm_rows(Gemm<T>{lin, dp, tile_state, now.lanes, sum, now.lanes, sum, now.lanes, &ahead}, rows, d,
                vectors);
      write();
    }
  }
  // sum = weights W; of causal weights only what is on and below the diagonal.
  void multiply_weights(int32_t vectors) {
    const int32_t step = a.causal ? 4 * kN : rows;
    for (int32_t i = 0; i < rows; i += step) {
      const int32_t end = i + step < rows ? i + step : rows, keys = a.causal ? end : rows;
      gemm_rows(Gemm<T>{weights + int64_t(i) * gp, gp, tile_rows, now.lanes, nullptr, 0,
                        sum + int64_t(i) * now.lanes, now.lanes, &ahead},
                end - i, keys, vectors);
    }
  }

  // Rows of the next tile, and those that this tile's results go to, are prefetched a few at a time.
  void look_ahead() {
    constexpr int32_t kRowsOfTile = 6;
    const int32_t steps = 4 * (rows / kRowsOfTile + 1);
    ahead_row = 0, ahead_step = (rows + steps - 1) / steps;
  }
  static void prefetch(const S* row, int32_t count) {
    for (int32_t i = 0; i < count; i += 64 / static_cast<int32_t>(sizeof(S)))
      __builtin_prefetch(row + i, 0, 2);
  }
  static void prefetch_store(const S* row, int32_t count) {
    for (int32_t i = 0; i < count; i += 64 / static_cast<int32_t>(sizeof(S)))
      __builtin_prefetch(row + i, 1, 2);
  }
  static void step_ahead(void* context) {
    JointForward& w = *static_cast<JointForward*>(context);
    for (int32_t i = 0; i < w.ahead_step && w.ahead_row < w.rows; ++i, ++w.ahead_row) {
      const int64_t token = w.begin + w.ahead_row;
      for (int32_t x = 0; x < w.next.segments(); ++x) {
        const Segment &s = w.next.segment[x], &t = w.now.segment[x];
        prefetch(row_in<S>(s.part ? w.a.u : w.a.v, w.b, token) + s.first, s.count);
        const Matrix& to = x && w.a.u.data && !w.a.gate ? w.p.other : w.p.out;
        if (x == 0 || !w.a.gate) prefetch_store(row_in<S>(to, w.b, token) + t.first, t.count);
      }
    }
  }

  void write() const {
    if (a.gate) return write_gated();
    for (int32_t i = 0; i < rows; ++i) {
      for (int32_t x = 0; x < now.segments(); ++x) {
        const Segment& s = now.segment[x];
        const T* from = sum + int64_t(i) * now.lanes + s.at;
        S* to = row_to<S>(s.part ? p.other : p.out, b, begin + i) + s.first;
        for (int32_t c = 0; c < s.count; c += kN) store_lanes<S, T>(to + c, load(from + c), s.count - c);
      }
    }
  }
  void write_gated() const {
    const Segment& s = now.segment[0];
    const int32_t half = now.segment[1].at;
    for (int32_t i = 0; i < rows; ++i) {
      const T* from = sum + int64_t(i) * now.lanes;
      const S *v = row_in<S>(a.v, b, begin + i) + s.first, *u = row_in<S>(a.u, b, begin + i) + s.first;
      S* out = row_to<S>(p.out, b, begin + i) + s.first;
      S* inner_v = p.inner_v.data ? row_to<S>(p.inner_v, b, begin + i) + s.first : nullptr;
      S* inner_u = p.inner_v.data ? row_to<S>(p.inner_u, b, begin + i) + s.first : nullptr;
      for (int32_t c = 0; c < s.count; c += kN) {
        const int32_t left = s.count - c;
        const Vec<T> of_v = load(from + c), of_u = load(from + half + c);
        const Vec<T> y =
            of_u * load_lanes<S, T>(v + c, left) * sigmoid<T>(of_v * load_lanes<S, T>(u + c, left));
        store_lanes<S, T>(out + c, y, left);
        if (!inner_v) continue;
        store_lanes<S, T>(inner_v + c, of_v, left);
        store_lanes<S, T>(inner_u + c, of_u, left);
      }
    }
  }
};

template <class S, class T>
void run(const JointFwd& p, int threads) {
  cpu::Arena counter(nullptr);
  JointForward<S, T> counted(p);
  counted.carve(counter);
  const int64_t tiles = JointForward<S, T>::tiles(p.a), groups = p.a.groups();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    JointForward<S, T> w(p);
    cpu::Arena arena(cpu::thread_scratch(counter.used()));
    w.carve(arena);
    w.expand_bias();
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.a.batch * tiles; ++task)
      w.state(task / tiles, static_cast<int32_t>(task % tiles));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.a.batch * groups; ++task) w.group(task / groups, task % groups);
  }
}

}  // namespace

void joint_fwd(const JointFwd& p, int threads) {
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
