// How a linear problem is cut into runs of tokens of one sequence. Depends on the problem alone, never on the
// number of threads: sums over runs have one order.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdlib>

#include "linear_head.h"

namespace vicinal::VICINAL_ISA {

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

struct Sequence {
  int64_t sample, begin, count;  // tokens of the sample
};
inline Sequence sequence_of(const Linear& a, int64_t r, int64_t tokens) {
  if (!a.cu_seqlens) return {r, 0, tokens};
  return {0, a.cu_seqlens[r], a.cu_seqlens[r + 1] - a.cu_seqlens[r]};
}

constexpr int64_t kRunTokens = 1024;

// Runs of at most kRunTokens tokens; those of sequence r are first[r] .. first[r + 1] - 1.
class Runs {
 public:
  Runs(const Linear& a, int64_t tokens) : a_(a), tokens_(tokens) {
    first_ = static_cast<int64_t*>(std::malloc(sizeof(int64_t) * (a.sequences + 1)));
    if (!first_) std::abort();
    first_[0] = 0;
    for (int64_t r = 0; r < a.sequences; ++r) {
      first_[r + 1] = first_[r] + (sequence_of(a, r, tokens).count + kRunTokens - 1) / kRunTokens;
    }
  }
  ~Runs() { std::free(first_); }
  Runs(const Runs&) = delete;
  Runs& operator=(const Runs&) = delete;

  int64_t count() const { return first_[a_.sequences]; }
  int64_t first(int64_t r) const { return first_[r]; }
  int64_t sequence(int64_t run) const {
    int64_t low = 0, high = a_.sequences;  // first_[low] <= run < first_[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_[middle] <= run ? low : high) = middle;
    }
    return low;
  }
  Sequence tokens(int64_t run, int64_t r) const {
    const Sequence s = sequence_of(a_, r, tokens_);
    const int64_t n = first_[r + 1] - first_[r], size = (s.count + n - 1) / n;  // even runs, whole tiles
    const int64_t whole = (size + kTile - 1) / kTile * kTile, at = (run - first_[r]) * whole;
    const int64_t left = s.count - at;
    return {s.sample, s.begin + at, left < whole ? (left < 0 ? 0 : left) : whole};
  }

 private:
  const Linear& a_;
  int64_t tokens_, *first_;
};

// Heads of q and k that one task takes through a run: all of them where tokens lie next to each other, fewer
// where their sums would not fit the cache or tasks would be few.
inline int32_t heads_of_task(const Linear& a, int64_t runs, int64_t bytes_of_sums) {
  constexpr int64_t kCacheBytes = 256 * 1024, kFewest = 32;
  int64_t heads = a.heads_qk;
  while (heads > 1 &&
         (heads * bytes_of_sums > kCacheBytes || runs * ((a.heads_qk + heads - 1) / heads) < kFewest)) {
    heads = (heads + 1) / 2;
  }
  return static_cast<int32_t>(heads);
}

// The tiles of a run and the heads of a task, in the order in which they lie in memory: a tile of all heads
// after the other, or, where tokens are contiguous (NCHW), a head after the other.
struct Walk {
  int64_t tiles;
  int32_t heads;
  bool by_head;

  Walk(const Strided& x, const Sequence& s, int32_t n_heads)
      : tiles((s.count + kTile - 1) / kTile), heads(n_heads), by_head(x.stride_n < x.stride_h) {}
  int64_t count() const { return tiles * heads; }
  int64_t tile(int64_t at) const { return by_head ? at % tiles : at / heads; }
  int32_t head(int64_t at) const { return static_cast<int32_t>(by_head ? at / tiles : at % heads); }
};

inline int32_t tile_tokens(const Sequence& s, int64_t tile) {
  const int64_t left = s.count - tile * kTile;
  return static_cast<int32_t>(left < kTile ? left : kTile);
}

// Calls of `Ahead::step` by a product of m rows.
inline int gemm_steps(int m, int vectors) {
  const int strips = (vectors + kTileVectors - 1) / kTileVectors, rows = vectors < kTileVectors ? 12 : 6;
  return strips * ((m + rows - 1) / rows);
}

// Fetch what the item after `at` of a walk reads and writes: two tensors with the heads of q and k (the
// second may be null), and two with those of v, of which the first head is fetched.
template <class S, class T>
void set_next(Head<S, T>& w, const Walk& walk, int64_t at, const Sequence& s, int32_t h0, const Strided& x,
              const Strided* dx, const Strided& y, const Strided* dy) {
  Coming& c = w.coming;
  c.clear();
  if (at + 1 >= walk.count()) return;
  const int64_t n0 = s.begin + walk.tile(at + 1) * kTile;
  const int32_t n = tile_tokens(s, walk.tile(at + 1)), h = h0 + walk.head(at + 1);
  c.add(Place<S>(x, s.sample, n0, n, h, w.z.dim));
  if (dx) c.add(Place<S>(*dx, s.sample, n0, n, h, w.z.dim));
  c.add(Place<S>(y, s.sample, n0, n, h * w.z.shared, w.z.dim_v));
  if (dy) c.add(Place<S>(*dy, s.sample, n0, n, h * w.z.shared, w.z.dim_v));
  c.spread(gemm_steps(kTile, w.z.Vp / kLanes<T>));
}

// Tokens that belong to no sequence: zeros.
template <class S>
void clear_rest(const Linear& a, const Strided& x, int64_t tokens, int32_t heads, int32_t dim) {
  if (!a.cu_seqlens || !x.data) return;
  for (int64_t i = a.cu_seqlens[a.sequences]; i < tokens; ++i) {
    for (int32_t h = 0; h < heads; ++h) {
      for (int32_t d = 0; d < dim; ++d) element<S>(x, 0, i, h)[d * x.stride_d] = S{};
    }
  }
}

}  // namespace vicinal::VICINAL_ISA
