// Causal linear attention, backward: one task takes one sequence and the heads that share one of q and k,
// first forwards for the sums that enter each chunk, then backwards for the gradients.
//
// Work per token and head: five products with sums, 10 K V (one of them repeats the forward's), and five
// squares up to the diagonal, (C + 1) (3 K + 2 V): 62 kflop at C = K = V = 64. The sums entering all chunks
// of a sequence, N / C of them, stay in the thread's memory. Measured together with the forward as in
// linear_full.cpp: 69-74% of the FMA rate.
#include "linear_causal.h"

namespace vicinal::VICINAL_ISA {
namespace {

template <class S, class T>
struct Backward : Chunk<S, T> {
  using Chunk<S, T>::a;
  using Chunk<S, T>::z;
  using Chunk<S, T>::n;
  using Chunk<S, T>::f;
  using Chunk<S, T>::p;
  using Chunk<S, T>::v;
  using Chunk<S, T>::o;  // r
  using Chunk<S, T>::u;
  using Chunk<S, T>::d;

  const LinearBwd& w;
  const int64_t chunks;  // most of a sequence
  T* states;             // st and z entering each chunk, and after the last, per shared head
  T* grads;              // per shared head: dh transposed, and dz
  T* dh;                 // [K][Vp]
  T* slopes;             // P, a square
  T* y;                  // a tile [kTile][Vp]: dv
  T *up, *dup, *ddp;     // gradients of p like u, du, dd of f
  T* db;

  Backward(const LinearBwd& bwd, int64_t most_chunks) : Chunk<S, T>(bwd.a), w(bwd), chunks(most_chunks) {}

  int64_t stride() const { return (z.st() + z.Kdp + 15) / 16 * 16; }
  void carve_more(cpu::Arena& arena) {
    this->carve_chunk(arena);
    states = arena.take<T>((chunks + 1) * z.shared * stride()), grads = arena.take<T>(z.shared * stride());
    dh = arena.take<T>(z.s()), slopes = arena.take<T>(kTile * kTile), y = arena.take<T>(kTile * z.Vp);
    up = arena.take<T>(kTile * z.Kp), dup = arena.take<T>(kTile * z.Kp);
    ddp = z.own_den ? arena.take<T>(kTile * z.Kdp) : nullptr;
    db = arena.take<T>(kTile * 2);
  }
  T* state(int64_t chunk, int32_t shared) const { return states + (chunk * z.shared + shared) * stride(); }

  void load_transposed(const void* s, const void* sums_z, int64_t index, T* to) {
    const Sums<T> sums = {dh, to, to + z.st()};
    load_sums(s, sums_z, index, z, sums);
    transpose_sums(sums, z);
  }
  void set_chunk(const Sequence& s, int64_t i, int32_t step) {
    const int64_t begin = i * step, left = s.count - begin;
    this->set_tile(s.sample, s.begin + begin, static_cast<int32_t>(left < step ? left : step));
  }

  // After load_k, load_v and set_decay: the state after the chunk. v is scaled.
  void advance(const T* from, T* to) {
    const T* init = from;
    if (a.decay) {
      scale_rows(v, z.Vp, this->left, n, z.Vp);
      for (int64_t i = 0; i < z.st(); i += kLanes<T>) store(to + i, load(from + i) * this->keep);
      init = to;
    }
    gemm_columns(product<T>(v, z.Vp, p, z.Kp, init, to, z.Kp, &this->coming.ahead), z.dim_v, n,
                 z.Kp / kLanes<T>);
    const T keep = a.decay ? this->keep : T(1);
    for (int i = 0; i < z.Kdp; ++i) to[z.st() + i] = from[z.st() + i] * keep;
    if (a.normalize) add_rows<T>(this->pd, z.Kdp, a.decay ? this->left : nullptr, n, z.Kdp, to + z.st());
  }
  void sweep_states(const Sequence& s, int64_t r, int32_t hk, int32_t step, int64_t count) {
    for (int32_t g = 0; g < z.shared; ++g) {
      load_transposed(a.initial_s, a.initial_z, r * a.heads + hk * z.shared + g, state(0, g));
    }
    this->start_head();
    this->coming.clear();
    for (int64_t i = 0; i < count; ++i) {
      set_chunk(s, i, step);
      this->load_k(hk);
      for (int32_t g = 0; g < z.shared; ++g) {
        const int32_t h = hk * z.shared + g;
        this->constant_ready = this->constant_ready && z.shared == 1;
        this->set_decay(h);
        this->load_v(h);
        advance(state(i, g), state(i + 1, g));
      }
    }
  }

  // The squares: weights A, and (r_i . v_j), which `query_gradients` makes P; and what u gets from the sums.
  void squares(const T* h_t) {
    this->transpose_to_columns(p, z.Kp, z.K);
    this->square(f, z.Kp, z.K, this->weights);
    this->apply_power(nullptr, this->weights);
    this->transpose_to_columns(v, z.Vp, z.dim_v);
    this->square(o, z.Vp, z.dim_v, slopes);
    gemm_rows(product<T>(o, z.Vp, h_t, z.Kp, nullptr, u, z.Kp, &this->coming.ahead), n, z.dim_v,
              z.Kp / kLanes<T>);
    if (a.decay) scale_rows(u, z.Kp, this->e, n, z.Kp);
  }
  // d = -(out . dout) / den, without out: it may be rounded, and dq is a difference in which that would show.
  void den_slopes() {
    if (!a.normalize) return;
    row_dots(f, z.Kp, u, z.Kp, n, z.Kp, d);
    for (int i0 = 0; i0 < n; i0 += kStrip) {
      const int m = n - i0 < kStrip ? n - i0 : kStrip;
      row_dots(this->weights + i0 * kTile, kTile, slopes + i0 * kTile, kTile, m, i0 + kStrip, this->den + i0);
    }
    for (int i = 0; i < n; ++i) d[i] = -(d[i] + this->den[i]) * this->inverse[i];
  }
  void query_gradients(const T* h_t) {
    const bool shared_den = a.normalize && !z.own_den;
    this->apply_power(shared_den ? d : nullptr, slopes);
    if (shared_den) {
      for (int i = 0; i < n; ++i) this->den[i] = a.decay ? d[i] * this->e[i] : d[i];
      add_to_rows(u, z.Kp, this->den, h_t + z.st(), n, z.Kp);
    }
    this->below(slopes, p, z.Kp, u);
  }
  void key_gradients(const T* dh_t, int32_t h) {
    gemm_rows(product<T>(v, z.Vp, dh_t, z.Kp, nullptr, up, z.Kp, &this->coming.ahead), n, z.dim_v,
              z.Kp / kLanes<T>);
    if (a.normalize && !z.own_den) add_to_rows<T>(up, z.Kp, nullptr, dh_t + z.st(), n, z.Kp);
    transpose_tile(dh_t, z.Kp, z.dim_v, z.K, dh, z.Vp);
    gemm_rows(product<T>(p, z.Kp, dh, z.Vp, nullptr, y, z.Vp, &this->coming.ahead), n, z.K, z.Vp / kLanes<T>);
    if (a.decay) {
      scale_rows(up, z.Kp, this->left, n, z.Kp);
      scale_rows(y, z.Vp, this->left, n, z.Vp);
    }
    this->above(slopes, f, z.Kp, up);
    this->above(this->weights, o, z.Vp, y);
    unpack_tile<S, T>(y, z.Vp, nullptr, this->place(w.dv, h, z.dim_v));
  }
  // Where the denominator has its own features: gradients of fd and pd of this head, added to dd and ddp;
  // what they add to db.
  void den_gradients(const T* h_t, const T* dh_t) {
    if (!z.own_den || !a.normalize) return;
    T* one = this->columns;  // [kTile][Kdp]
    this->outer_square(d, slopes);
    fill(one, T(0), int64_t(n) * z.Kdp);
    add_to_rows(one, z.Kdp, d, h_t + z.st(), n, z.Kdp);
    if (a.decay) scale_rows(one, z.Kdp, this->e, n, z.Kdp);
    this->below(slopes, this->pd, z.Kdp, one);
    row_dots(this->fd, z.Kdp, one, z.Kdp, n, z.Kdp, this->den);
    add_into(this->dd, one, int64_t(n) * z.Kdp);
    for (int i = 0; i < n; ++i) db[i] += this->den[i];
    fill(one, T(0), int64_t(n) * z.Kdp);
    add_to_rows<T>(one, z.Kdp, nullptr, dh_t + z.st(), n, z.Kdp);
    if (a.decay) scale_rows(one, z.Kdp, this->left, n, z.Kdp);
    this->above(slopes, this->fd, z.Kdp, one);
    row_dots(this->pd, z.Kdp, one, z.Kdp, n, z.Kdp, this->den);
    add_into(ddp, one, int64_t(n) * z.Kdp);
    for (int i = 0; i < n; ++i) db[i] -= this->den[i];
  }
  // <h', dh> + <z', dz>
  T overlap(const T* next, const T* dh_t) const {
    Vec<T> sum = {};
    for (int64_t i = 0; i < z.st() + z.Kdp; i += kLanes<T>) sum += load(next + i) * load(dh_t + i);
    return sum_lanes<T>(sum);
  }
  void decay_gradients(const T* next, const T* dh_t, int32_t h) {
    T* to = static_cast<T*>(w.ddecay) + (this->b * a.n_k + this->n0) * a.heads + h;
    T sum = overlap(next, dh_t);
    for (int i = n - 1; i >= 0; --i) to[int64_t(i) * a.heads] = sum += db[i];
  }
  // After everything that reads r: the gradients of the state before the chunk. r is scaled.
  void retreat(T* dh_t) {
    T* dz = dh_t + z.st();
    if (a.decay) {
      scale_rows(o, z.Vp, this->e, n, z.Vp);
      for (int i = 0; i < n; ++i) d[i] *= this->e[i];
      for (int64_t i = 0; i < z.st() + z.Kdp; i += kLanes<T>) store(dh_t + i, load(dh_t + i) * this->keep);
    }
    gemm_columns(product<T>(o, z.Vp, f, z.Kp, dh_t, dh_t, z.Kp, &this->coming.ahead), z.dim_v, n,
                 z.Kp / kLanes<T>);
    if (a.normalize) add_rows<T>(this->fd, z.Kdp, d, n, z.Kdp, dz);
  }

  void chunk(int64_t i, int32_t hk) {
    this->load_q(hk);
    this->load_k(hk);
    this->begin_gather();
    if (z.own_den) fill(ddp, T(0), int64_t(kTile) * z.Kdp);
    if (z.shared > 1) fill(dup, T(0), int64_t(n) * z.Kp);
    for (int32_t g = 0; g < z.shared; ++g) {
      const int32_t h = hk * z.shared + g;
      T* dh_t = grads + g * stride();
      this->constant_ready = this->constant_ready && z.shared == 1;
      this->set_decay(h);
      this->load_v(h);
      this->load_dout(w, h);
      squares(state(i, g));
      den_slopes();
      query_gradients(state(i, g));
      key_gradients(dh_t, h);
      if (w.ddecay) {
        row_dots(f, z.Kp, u, z.Kp, n, z.Kp, db);
        row_dots(p, z.Kp, up, z.Kp, n, z.Kp, db + kTile);
        for (int j = 0; j < n; ++j) db[j] -= db[kTile + j];
      }
      den_gradients(state(i, g), dh_t);
      if (w.ddecay) decay_gradients(state(i + 1, g), dh_t, h);
      retreat(dh_t);
      this->gather();
      if (z.shared > 1) add_into(dup, up, int64_t(n) * z.Kp);
    }
    this->store_dq(w, hk);
    if (z.own_den) __builtin_memcpy(this->dd, ddp, sizeof(T) * kTile * z.Kdp);
    this->store_dk_of(z.shared > 1 ? dup : up, w, hk);
  }

  void run(int64_t r, int32_t hk) {
    const Sequence s = sequence_of(a, r, a.n_q);
    const int32_t step = chunk_tokens(a);
    const int64_t count = (s.count + step - 1) / step;
    sweep_states(s, r, hk, step, count);
    for (int32_t g = 0; g < z.shared; ++g) {
      load_transposed(w.dfinal_s, w.dfinal_z, r * a.heads + hk * z.shared + g, grads + g * stride());
    }
    this->constant_ready = false;
    for (int64_t i = count - 1; i >= 0; --i) {
      set_chunk(s, i, step);
      chunk(i, hk);
    }
    for (int32_t g = 0; g < z.shared; ++g) {
      T* dh_t = grads + g * stride();
      transpose_tile(dh_t, z.Kp, z.dim_v, z.K, dh, z.Vp);
      store_sums<T>({dh, nullptr, dh_t + z.st()}, z, w.dinitial_s, w.dinitial_z,
                    r * a.heads + hk * z.shared + g);
    }
  }
};

int64_t most_chunks(const Linear& a) {
  int64_t most = 0;
  for (int64_t r = 0; r < a.sequences; ++r) {
    const int64_t n = (sequence_of(a, r, a.n_q).count + chunk_tokens(a) - 1) / chunk_tokens(a);
    if (n > most) most = n;
  }
  return most;
}

}  // namespace

template <class S, class T>
void causal_bwd(const LinearBwd& p, int threads) {
  const int64_t chunks = most_chunks(p.a);
  const auto extra = [&](cpu::Arena& arena) {
    Backward<S, T> counted(p, chunks);
    counted.carve_more(arena);
  };
  const Team<S, T> team(p.a, true, threads, [](cpu::Arena&) {}, extra);
#pragma omp parallel num_threads(team.threads) if (team.threads > 1)
  {
    Backward<S, T> w(p, chunks);
    team.start(w, [&](cpu::Arena& arena) { w.carve_more(arena); });
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.a.sequences * p.a.heads_qk; ++task) {
      w.run(task / p.a.heads_qk, static_cast<int32_t>(task % p.a.heads_qk));
    }
  }
}

#define INSTANTIATE(S, T) template void causal_bwd<S, T>(const LinearBwd&, int);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(BFloat16, float)
INSTANTIATE(Half, float)
#undef INSTANTIATE

}  // namespace vicinal::VICINAL_ISA
