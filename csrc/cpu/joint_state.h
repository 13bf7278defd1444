// The linear memory of joint attention, and its gradient: running sums over tokens of L_j X_j^T, where L is
// lin_k and X = W (forward), or L = lin_q and X = dO (backward, from the last group to the first).
//
// A task is a sample and a tile of columns, over all its tokens in order: the sums do not depend on the
// number of threads. Without `causal` there is one state, the sum over all tokens; with it the state of a
// group is the sum over the groups before it (backward: after it).
#pragma once
#include "joint_block.h"

namespace vicinal::VICINAL_ISA {

constexpr int kStateTokens = 256;  // packed at a time

template <class T>
struct StateScratch {
  T *rows, *tile, *sum;  // [kStateTokens][dp], [kStateTokens][lanes], [dim][lanes]

  void carve(cpu::Arena& arena, const Joint& a) {
    const int32_t lanes = 2 * kTileLanes<T>;
    rows = arena.take<T>(int64_t(kStateTokens) * round_up(a.dim, kLanes<T>));
    tile = arena.take<T>(int64_t(kStateTokens) * lanes);
    sum = arena.take<T>(int64_t(a.dim) * lanes);
  }
};

// Adds the tokens first .. first + count - 1. pack(tile, first, count, to) writes the rows of X.
template <class S, class T, class Pack>
void add_tokens(const JointBlock<S, T>& w, const StateScratch<T>& x, const Matrix& left,
                const uint8_t* ignored, const Tile& tile, int64_t first, int64_t count, const Pack& pack) {
  for (int64_t at = first; at < first + count; at += kStateTokens) {
    const int64_t rest = first + count - at;
    const int32_t tokens = static_cast<int32_t>(rest < kStateTokens ? rest : kStateTokens);
    const uint8_t* skip = ignored ? ignored + at : nullptr;
    const T* rows = x.rows;
    int64_t stride = w.dp;
    if constexpr (std::is_same_v<S, T>) rows = row_in<S>(left, w.b, at), stride = left.stride_n;
    if (skip || rows == x.rows || !std::is_same_v<S, T>) {
      w.pack_rows(left, at, tokens, T(1), skip, x.rows);
      rows = x.rows, stride = w.dp;
    }
    pack(tile, at, tokens, skip, x.tile);
    gemm_columns(Gemm<T>{rows, stride, x.tile, tile.lanes, x.sum, tile.lanes, x.sum, tile.lanes, nullptr},
                 w.d, tokens, tile.lanes / JointBlock<S, T>::kN);
  }
}

// One task: all states of sample w.b, columns of `tile`. `states` is acc [states of the sample][dim][width].
template <class S, class T, class Pack>
void sum_states(const JointBlock<S, T>& w, const StateScratch<T>& x, const Matrix& left, bool skip_ignored,
                bool backwards, T factor, const Tile& tile, T* states, const Pack& pack) {
  const Joint& a = w.a;
  const uint8_t* ignored = skip_ignored && a.ignored ? a.ignored + w.b * a.n : nullptr;
  for (int64_t i = 0; i < int64_t(a.dim) * tile.lanes; ++i) x.sum[i] = 0;
  const int64_t size = int64_t(a.dim) * a.width();
  if (!a.causal) {
    add_tokens(w, x, left, ignored, tile, 0, a.n, pack);
    w.unpack_state(x.sum, tile, factor, states);
    return;
  }
  for (int64_t step = 0; step < a.groups(); ++step) {
    const int64_t group = backwards ? a.groups() - 1 - step : step, first = group * a.group;
    w.unpack_state(x.sum, tile, factor, states + group * size);
    if (step + 1 == a.groups()) break;
    const int64_t count = a.n - first < a.group ? a.n - first : a.group;
    add_tokens(w, x, left, ignored, tile, first, count, pack);
  }
}

}  // namespace vicinal::VICINAL_ISA
