// Block-causal linear attention: a token reads the sums of whole blocks, those before its own or up to it.
// One task takes one sequence and one head of q and k from the first block to the last.
#include "linear_kernels.h"

namespace vicinal::VICINAL_ISA {
namespace {

template <class T>
struct States {
  const Sizes<T> z;
  int64_t stride() const { return (z.s() + z.st() + z.Kdp + 15) / 16 * 16; }
  explicit States(const Linear& a) : z(a) {}
  Sums<T> at(T* base, int64_t i) const {
    T* x = base + i * stride();
    return {x, x + z.s(), x + z.s() + z.st()};
  }
};

struct Block {
  int64_t begin, count;
};
Block block_of(const Linear& a, const Sequence& s, int64_t i) {
  const int64_t begin = i * a.block_size, left = s.count - begin;
  return {s.begin + begin, left < a.block_size ? left : a.block_size};
}
int64_t blocks_of(const Linear& a, const Sequence& s) { return (s.count + a.block_size - 1) / a.block_size; }

// visit() for every tile of a block, which is set.
template <class S, class T, class Visit>
void each_tile(Head<S, T>& w, const Sequence& s, const Block& block, Visit visit) {
  for (int64_t i = 0; i < block.count; i += kTile) {
    const int64_t left = block.count - i;
    w.set_tile(s.sample, block.begin + i, static_cast<int32_t>(left < kTile ? left : kTile));
    visit();
  }
}

template <class S, class T>
void add_block(Head<S, T>& w, const Sequence& s, const Block& block, int32_t hk, const States<T>& states,
               T* base) {
  const int32_t g = w.z.shared;
  each_tile(w, s, block, [&] {
    w.load_k(hk);
    for (int32_t u = 0; u < g; ++u) {
      w.load_v(hk * g + u);
      w.add(states.at(base, u));
    }
  });
}

template <class S, class T>
void forward(Head<S, T>& w, const LinearFwd& p, const States<T>& states, T* base, int64_t r, int32_t hq) {
  const Linear& a = p.a;
  const Sequence s = sequence_of(a, r, a.n_q);
  const int32_t g = w.z.shared;
  for (int32_t u = 0; u < g; ++u) {
    load_sums(a.initial_s, a.initial_z, r * a.heads + hq * g + u, w.z, states.at(base, u));
  }
  for (int64_t i = 0; i < blocks_of(a, s); ++i) {
    const Block block = block_of(a, s, i);
    if (a.mask == kMaskBlocksUpTo) add_block(w, s, block, hq, states, base);
    each_tile(w, s, block, [&] {
      w.load_q(hq);
      for (int32_t u = 0; u < g; ++u) w.read(p, hq * g + u, states.at(base, u));
    });
    if (a.mask == kMaskBlocksBefore) add_block(w, s, block, hq, states, base);
  }
  for (int32_t u = 0; u < g; ++u) {
    store_sums(states.at(base, u), w.z, p.final_s, p.final_z, r * a.heads + hq * g + u);
  }
}

// dq, from the first block to the last; the gradients of the sums that a block reads into grads[block].
template <class S, class T>
void backward_queries(Head<S, T>& w, const LinearBwd& p, const States<T>& states, T* base, T* grads,
                      int64_t r, int32_t hq) {
  const Linear& a = p.a;
  const Sequence s = sequence_of(a, r, a.n_q);
  const int32_t g = w.z.shared;
  for (int32_t u = 0; u < g; ++u) {
    load_sums(a.initial_s, a.initial_z, r * a.heads + hq * g + u, w.z, states.at(base, u));
  }
  for (int64_t i = 0; i < blocks_of(a, s); ++i) {
    const Block block = block_of(a, s, i);
    if (a.mask == kMaskBlocksUpTo) add_block(w, s, block, hq, states, base);
    for (int32_t u = 0; u < g; ++u) {
      transpose_sums(states.at(base, u), w.z);
      load_sums<T>(nullptr, nullptr, 0, w.z, states.at(grads, i * g + u));
    }
    each_tile(w, s, block, [&] {
      w.load_q(hq);
      w.begin_gather();
      for (int32_t u = 0; u < g; ++u) {
        w.load_dout(p, hq * g + u);
        w.read_gradient(states.at(base, u), states.at(grads, i * g + u));
        w.gather();
      }
      w.store_dq(p, hq);
    });
    if (a.mask == kMaskBlocksBefore) add_block(w, s, block, hq, states, base);
  }
}

// dk and dv, from the last block to the first.
template <class S, class T>
void backward_keys(Head<S, T>& w, const LinearBwd& p, const States<T>& states, T* base, T* grads, int64_t r,
                   int32_t hk) {
  const Linear& a = p.a;
  const Sequence s = sequence_of(a, r, a.n_q);
  const int32_t g = w.z.shared;
  const auto gather = [&](int64_t i) {
    for (int32_t u = 0; u < g; ++u) {
      const Sums<T> to = states.at(base, u), from = states.at(grads, i * g + u);
      add_into(to.s, from.s, w.z.s());
      add_into(to.z, from.z, w.z.Kdp);
    }
  };
  for (int32_t u = 0; u < g; ++u) {
    load_sums(p.dfinal_s, p.dfinal_z, r * a.heads + hk * g + u, w.z, states.at(base, u));
  }
  for (int64_t i = blocks_of(a, s) - 1; i >= 0; --i) {
    if (a.mask == kMaskBlocksUpTo) gather(i);
    for (int32_t u = 0; u < g; ++u) transpose_sums(states.at(base, u), w.z);
    each_tile(w, s, block_of(a, s, i), [&] {
      w.load_k(hk);
      w.begin_gather();
      for (int32_t u = 0; u < g; ++u) {
        w.load_v(hk * g + u);
        w.add_gradient(p, hk * g + u, states.at(base, u));
        w.gather();
      }
      w.store_dk(p, hk);
    });
    if (a.mask == kMaskBlocksBefore) gather(i);
  }
  for (int32_t u = 0; u < g; ++u) {
    store_sums(states.at(base, u), w.z, p.dinitial_s, p.dinitial_z, r * a.heads + hk * g + u);
  }
}

int64_t most_blocks(const Linear& a) {
  int64_t most = 0;
  for (int64_t r = 0; r < a.sequences; ++r) {
    const int64_t n = blocks_of(a, sequence_of(a, r, a.n_q));
    if (n > most) most = n;
  }
  return most;
}

}  // namespace

template <class S, class T>
void blocks_fwd(const LinearFwd& p, int threads) {
  const States<T> states(p.a);
  const auto extra = [&](cpu::Arena& arena) { return arena.take<T>(states.stride() * states.z.shared); };
  const Team<S, T> team(p.a, false, threads, [](cpu::Arena&) {}, extra);
#pragma omp parallel num_threads(team.threads) if (team.threads > 1)
  {
    Head<S, T> w(p.a);
    T* base = team.start(w, extra);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.a.sequences * p.a.heads_qk; ++task) {
      forward(w, p, states, base, task / p.a.heads_qk, static_cast<int32_t>(task % p.a.heads_qk));
    }
  }
}

template <class S, class T>
void blocks_bwd(const LinearBwd& p, int threads) {
  const States<T> states(p.a);
  const int64_t one = states.stride() * states.z.shared, most = most_blocks(p.a);
  const auto extra = [&](cpu::Arena& arena) { return arena.take<T>(one * (1 + most)); };
  const Team<S, T> team(p.a, true, threads, [](cpu::Arena&) {}, extra);
#pragma omp parallel num_threads(team.threads) if (team.threads > 1)
  {
    Head<S, T> w(p.a);
    T* base = team.start(w, extra);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.a.sequences * p.a.heads_qk; ++task) {
      const int64_t r = task / p.a.heads_qk;
      const int32_t h = static_cast<int32_t>(task % p.a.heads_qk);
      backward_queries(w, p, states, base, base + one, r, h);
      backward_keys(w, p, states, base, base + one, r, h);
    }
  }
}

#define INSTANTIATE(S, T)                                \
  template void blocks_fwd<S, T>(const LinearFwd&, int); \
  template void blocks_bwd<S, T>(const LinearBwd&, int);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(BFloat16, float)
INSTANTIATE(Half, float)
#undef INSTANTIATE

}  // namespace vicinal::VICINAL_ISA
