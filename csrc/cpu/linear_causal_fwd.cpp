// Causal linear attention, forward: one task takes one head of one sequence, chunk by chunk.
//
// Work per token and head, chunks of C = 64, K = V = 64: two products with the sums, 4 K V, and two squares
// up to the diagonal, (C + 1) (K + V): 25 kflop, of which strips of 16 do 27. Expected: two thirds of the FMA
// rate. Measured as in linear_full.cpp: 85% without a decay and 90% with one, of a rate that a busy neighbour
// lowers in the probe as well; not to be taken for more than "above 60%" until a quiet run.
#include "linear_causal.h"

namespace vicinal::VICINAL_ISA {
namespace {

template <class S, class T>
struct Forward : Chunk<S, T> {
  using Chunk<S, T>::a;
  using Chunk<S, T>::z;
  using Chunk<S, T>::n;
  Sums<T> sums;

  explicit Forward(const Linear& linear) : Chunk<S, T>(linear) {}
  void carve_more(cpu::Arena& arena) {
    this->carve_chunk(arena);
    sums = {arena.take<T>(z.s()), nullptr, arena.take<T>(z.Kdp)};
  }

  // What the tokens of the chunk get from each other and from the sums.
  void outputs(const LinearFwd& w, int32_t h) {
    this->transpose_to_columns(this->p, z.Kp, z.K);
    this->square(this->f, z.Kp, z.K, this->weights);
    this->apply_power(nullptr, this->weights);
    gemm_rows(product<T>(this->f, z.Kp, sums.s, z.Vp, nullptr, this->o, z.Vp, &this->coming.ahead), n, z.K,
              z.Vp / kLanes<T>);
    if (a.decay) scale_rows(this->o, z.Vp, this->e, n, z.Vp);
    this->below(this->weights, this->v, z.Vp, this->o);
    if (a.normalize) {
      if (z.own_den) {
        this->transpose_to_columns(this->pd, z.Kdp, z.Kd);
        this->square(this->fd, z.Kdp, z.Kd, this->weights);
        this->apply_power(nullptr, this->weights);
      }
      row_dots(this->fd, z.Kdp, sums.z, 0, n, z.Kdp, this->den);
      this->row_sums(this->weights, this->inverse);
      for (int i = 0; i < n; ++i) {
        this->den[i] = (a.decay ? this->den[i] * this->e[i] : this->den[i]) + this->inverse[i];
      }
    }
    this->finish(w, h);
  }
  // The sums after the chunk.
  void advance() {
    if (a.decay) {
      scale_rows(this->v, z.Vp, this->left, n, z.Vp);
      for (int64_t i = 0; i < z.s(); i += kLanes<T>) store(sums.s + i, load(sums.s + i) * this->keep);
      for (int i = 0; i < z.Kdp; ++i) sums.z[i] *= this->keep;
    }
    gemm_columns(product<T>(this->p, z.Kp, this->v, z.Vp, sums.s, sums.s, z.Vp, &this->coming.ahead), z.K, n,
                 z.Vp / kLanes<T>);
    if (a.normalize) add_rows<T>(this->pd, z.Kdp, a.decay ? this->left : nullptr, n, z.Kdp, sums.z);
  }

  void run(const LinearFwd& w, int64_t r, int32_t h) {
    const Sequence s = sequence_of(a, r, a.n_q);
    const int32_t step = chunk_tokens(a), hq = h / z.shared;
    load_sums(a.initial_s, a.initial_z, r * a.heads + h, z, sums);
    this->start_head();
    for (int64_t i = 0; i < s.count; i += step) {
      const int64_t left = s.count - i;
      this->set_tile(s.sample, s.begin + i, static_cast<int32_t>(left < step ? left : step));
      this->set_next_chunk(hq, h, s.begin + s.count, 24, a.v, w.out);
      this->set_decay(h);
      this->load_q(hq);
      this->load_k(hq);
      this->load_v(h);
      outputs(w, h);
      advance();
    }
    store_sums(sums, z, w.final_s, w.final_z, r * a.heads + h);
  }
};

}  // namespace

template <class S, class T>
void causal_fwd(const LinearFwd& p, int threads) {
  const auto extra = [&](cpu::Arena& arena) {
    Forward<S, T> counted(p.a);
    counted.carve_more(arena);
  };
  const Team<S, T> team(p.a, false, threads, [](cpu::Arena&) {}, extra);
#pragma omp parallel num_threads(team.threads) if (team.threads > 1)
  {
    Forward<S, T> w(p.a);
    team.start(w, [&](cpu::Arena& arena) { w.carve_more(arena); });
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.a.sequences * p.a.heads; ++task) {
      w.run(p, task / p.a.heads, static_cast<int32_t>(task % p.a.heads));
    }
  }
}

#define INSTANTIATE(S, T) template void causal_fwd<S, T>(const LinearFwd&, int);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(BFloat16, float)
INSTANTIATE(Half, float)
#undef INSTANTIATE

}  // namespace vicinal::VICINAL_ISA
