// context attention: attention inside segments of rows with terms by the offset between two cells, on three
// axes.
//
//   r_a = q_cell_i[a] - k_cell_j[a] + (offsets - 1) / 2     Tq, Tk, Tv = sum over a of the rows r_a of an
//   axis s_ij = scale q_i . (k_j + Tq) + k_j . Tk + key_bias_j   p = softmax(s)   out_i = sum_j p_ij (v_j +
//   Tv)
//
// Plain data only, as attend.h, whose plan it reads: rows of one query list and one key list, without flags.
// "acc" is float, or double when dtype is F64.
#pragma once
#include "attend.h"

namespace vicinal {

constexpr int kContextAxes = 3;    // an axis that is not there has cells and a table of zeros
constexpr int kContextWidth = 16;  // table rows have a whole number of so many elements, the last ones zeros

struct Context {
  DType dtype;
  int32_t heads, head_dim, head_dim_v;
  int64_t n_q, n_k;
  Rows q, k, v;  // [n, heads, D]; stride_b is 0
  Plan plan;
  double scale;
  const void* key_bias;              // acc [n_k], or null
  const int32_t *q_cells, *k_cells;  // [n, 3], all offsets of a pair within the tables
  int32_t offsets, width, width_v;   // rows of an axis; widths of Tq and Tk, and of Tv
  const void* tables;                // acc [heads][3][offsets][2 * width + width_v]: Tq, Tk, Tv

  int64_t row_size() const { return 2 * int64_t(width) + width_v; }
  int64_t table_size() const { return kContextAxes * offsets * row_size(); }  // of a head
};

struct ContextFwd {
  Context a;
  Rows out;
  void* lse;  // acc, element (n, h) at n * lse_stride_n + h
  int64_t lse_stride_n;
};

struct ContextBwd {
  Context a;
  Rows dout;
  const void *lse, *dlse;  // as ContextFwd; dlse or null
  int64_t lse_stride_n;
  Rows dq, dk, dv;  // a key belongs to one plan row
  void* dtables;    // as tables, overwritten
};

namespace cpu {
void context_fwd(const ContextFwd& p, int threads);
void context_bwd(const ContextBwd& p, int threads);
}  // namespace cpu

}  // namespace vicinal
