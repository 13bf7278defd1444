// attend: softmax (or relu, relu^2, linear) attention between the query box and the key box of each plan row.
//
// Plain data only, shared by the CPU and the CUDA launchers and by both compilers; no torch header.
// Strides count elements. "acc" is float, or double when dtype is F64.
#pragma once
#include <cstdint>

namespace vicinal {

enum DType : int32_t { kF32 = 0, kF64 = 1, kBF16 = 2, kF16 = 3 };
constexpr int kRelAxes = 3;  // of rel; one that is not there has coordinates and a table of zeros
enum Activation : int32_t { kSoftmax = 0, kRelu2 = 1, kRelu = 2, kIdentity = 3 };

// A tensor [B, N, H, D] with D contiguous.
struct Rows {
  void* data;
  int64_t stride_b, stride_n, stride_h;
};

// One position on one axis of a box. A slot of a box adds up the entries of its axes:
//   token  = sum of .token   (a row of the tensor; negative: the slot is a pad)
//   region = sum of .region  (one bit per axis; slots of different regions get mask_value)
//   code   = sum of .code    (bias index of a pair = code of the query slot + code of the key slot; the codes
//   of
//            a key box are distinct, or all 0 where the table has one entry besides those of extra rows)
//   coord  = sum of .coord   (key slots of a row with ranges: its place in the key box, a bit field per axis)
// In a row with kRowRanges the key box holds more than each query reads: there `region` and `coord` of a
// query slot are the first and the last coord that it sees, per field (visible() in pattern.h). Other pairs
// are excluded, and their bias index may lie outside the table.
struct AxisEntry {
  int32_t token, region, code, coord;
};

enum RowFlags : int32_t {
  kRowRegions = 1,    // slots of this row lie in more than one region
  kRowKeyPads = 2,    // the key box has pads
  kRowQueryPads = 4,  // the query box has pads
  kRowRanges = 8      // queries see parts of the key box; never together with kRowRegions
};

// Slots are row-major over the three axes, last axis fastest; unused leading axes have extent 1 and
// begin at entry 0, which is all zero. Extents differ between rows.
struct PlanRow {
  int32_t q_begin[3], q_extent[3];  // into Plan::axes
  int32_t k_begin[3], k_extent[3];
  int32_t flags;
  int32_t reserved[3];
};

struct Plan {
  const AxisEntry* axes;
  const PlanRow* rows;
  int64_t n_rows;
  int32_t q_slots, k_slots;  // most slots of a row
  int32_t guard;             // the bit above each field of the ranges; 0: no row has ranges
};

// Everything but the tensors that are written. Null pointers switch an option off.
//   s(i, j) = scale * q_scale_i * k_scale_j * (q_i . k_j) + bias[h, code_i + code_j] + key_bias[b, token_j]
//             + mask[(b * n_rows + row) % mask_count, h, i, j] + mask_value * [region_i != region_j]
//             + sum over the axes of rel[h, a, clip(q_coord_i[a] - k_coord_j[a], -bound, bound) + bound]
//
// Key slots: those of the key box (a pad is extra row 0 when edge_row, otherwise excluded), then the extra
// rows edge_row .. n_extra-1, which every plan row sees; they have no region, key_bias or mask, their k_scale
// is 1, and their bias is bias[h, bias_size - (n_extra - edge_row) + e]. A pad has no key_bias; its k_scale
// is 1.
//
// softmax: p = exp(s - lse); s = -inf is excluded. Other activations: p = act(s), excluded or cross-region
// p = 0; their lse is finite or -inf but has no meaning, and dlse is null.
//
// dropout: p is multiplied by keep / (1 - dropout_p); keep comes from philox.h at (slot, token of q,
// b * H_total + h), where slot is the key slot, or with drop_by_token the key's token (extra row e: n_k + e),
// which no choice of tiles changes.
//
// Grouped queries: head h reads head h / (heads / kv_heads) of k, v, extra_k and extra_v.
//
// A row of q without any finite s gives out 0, lse -inf and zero gradients.
struct Attend {
  DType dtype;
  Activation activation;
  int64_t batch;
  int32_t heads, kv_heads, head_dim, head_dim_v;
  int64_t n_q, n_k;  // tokens
  Rows q, k, v;
  Plan plan;
  double scale, mask_value;
  const void* bias;  // acc [heads, bias_size]
  int64_t bias_size;
  const void* q_scale;     // acc [B, n_q, heads], contiguous but for the head stride below
  const void* k_scale;     // acc [B, n_k, heads]
  int64_t scale_stride_n;  // elements between tokens of q_scale and k_scale (heads of the whole tensor)
  const void* key_bias;    // acc [B, n_k]
  const void* mask;        // acc [mask_count, 1 or heads, q_slots, k_slots]
  int64_t mask_count, mask_stride_w, mask_stride_h;
  Rows extra_k, extra_v;  // dtype [B, n_extra, H, D]; stride_b may be 0
  int32_t n_extra, edge_row;
  double dropout_p;
  const int64_t* seed;              // one element, in the memory of the device
  int32_t head_offset, head_total;  // for the dropout counter when heads are a slice
  int32_t drop_by_token;
  const int32_t *q_coords = nullptr, *k_coords = nullptr;  // [n, kRelAxes], for rel
  const void* rel =
      nullptr;           // acc [heads][kRelAxes][rel_size], or null; never with ranges, pads or extra rows
  int32_t rel_size = 0;  // 2 bound + 1
};

struct AttendFwd {
  Attend a;
  Rows out;   // dtype [B, n_q, H, Dv]
  void* lse;  // acc [B, n_q, *], element (b, n, h) at (b * n_q + n) * lse_stride_n + h
  int64_t lse_stride_n;
};

struct AttendBwd {
  Attend a;
  Rows out, dout;
  const void* lse;   // as AttendFwd
  const void* dlse;  // same layout, or null
  int64_t lse_stride_n;
  Rows dq, dk, dv;          // dtype; every token of the plan is written
  void* dbias;              // acc [heads, bias_size], overwritten; or null
  Rows dextra_k, dextra_v;  // acc [B, n_extra, kv_heads, D or Dv], overwritten; null data: not wanted
  // Whose rows own dk and dv. No rows: those of a.plan, where a key token belongs to at most one row (then
  // heads == kv_heads). Otherwise its key boxes partition the keys and its query boxes hold all queries that
  // read them (none: the gradients are 0); extra keys are no part of it, and it has no mask, no pads and no
  // other scales than `scale`. dq, dbias and dextra still follow a.plan.
  Plan key_plan;
  void* drel = nullptr;  // acc, as rel, overwritten; or null
};

// CPU: 0 on success. CUDA: a cudaError_t; workspace as asked for by attend_bwd_workspace.
namespace cpu {
void attend_fwd(const AttendFwd& p, int threads);
void attend_bwd(const AttendBwd& p, int threads);
}  // namespace cpu
namespace cuda {
int64_t attend_bwd_workspace(const AttendBwd& p);
int attend_fwd(const AttendFwd& p, void* stream);
int attend_bwd(const AttendBwd& p, void* workspace, void* stream);
const char* error_text(int error);
}  // namespace cuda

}  // namespace vicinal
