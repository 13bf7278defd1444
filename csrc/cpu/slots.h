// The slots of a plan row.
#pragma once
#include "memory.h"
#include "pattern.h"
#include "simd.h"

namespace vicinal::VICINAL_ISA {

constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

// Query slots and key slots of one plan row, extra keys included.
template <class T>
struct Slots {
  int64_t b = -1, row = -1;
  int32_t nq, nk, box;                         // box: key slots without the extra keys
  bool regions, key_terms, q_pads, k_special;  // k_special: a key slot that has no token, or is excluded
  int32_t *q_token, *q_code, *k_code;
  int32_t* k_source;  // token; kExcluded; or kExtra - e for extra row e
  int32_t* k_token;   // token, of excluded keys too; negative: pad or extra key
  T *q_region, *k_region, *k_term;

  static constexpr int32_t kExcluded = -1, kExtra = -2;

  void carve(cpu::Arena& arena, int64_t q_most, int64_t k_most) {
    q_token = arena.take<int32_t>(q_most), q_code = arena.take<int32_t>(q_most);
    k_source = arena.take<int32_t>(k_most), k_code = arena.take<int32_t>(k_most);
    k_token = arena.take<int32_t>(k_most);
    q_region = arena.take<T>(q_most), k_region = arena.take<T>(k_most), k_term = arena.take<T>(k_most);
  }
  void set(const Attend& a, int64_t batch, int64_t index);
};

template <class Visit>
inline int32_t visit_box(const AxisEntry* axes, const int32_t begin[3], const int32_t extent[3],
                         Visit visit) {
  int32_t slot = 0;
  for (int32_t r0 = 0; r0 < extent[0]; ++r0) {
    const AxisEntry& a = axes[begin[0] + r0];
    for (int32_t r1 = 0; r1 < extent[1]; ++r1) {
      const AxisEntry& b = axes[begin[1] + r1];
      for (int32_t r2 = 0; r2 < extent[2]; ++r2, ++slot) {
        const AxisEntry& c = axes[begin[2] + r2];
        visit(slot, a.token + b.token + c.token, a.region + b.region + c.region, a.code + b.code + c.code);
      }
    }
  }
  return slot;
}

template <class T>
void Slots<T>::set(const Attend& a, int64_t batch, int64_t index) {
  if (b == batch && row == index) return;
  b = batch, row = index;
  const PlanRow& r = a.plan.rows[index];
  const T unit = a.activation == kSoftmax ? T(kLog2E) : T(1), infinite = T(__builtin_inf());
  const T* key_bias = a.key_bias ? static_cast<const T*>(a.key_bias) + batch * a.n_k : nullptr;
  q_pads = k_special = false;
  nq = visit_box(a.plan.axes, r.q_begin, r.q_extent,
                 [&](int32_t i, int32_t token, int32_t region, int32_t code) {
                   q_token[i] = token, q_code[i] = code, q_region[i] = T(region);
                   q_pads = q_pads || token < 0;
                 });
  bool terms = key_bias != nullptr;
  box = visit_box(
      a.plan.axes, r.k_begin, r.k_extent, [&](int32_t j, int32_t token, int32_t region, int32_t code) {
        k_code[j] = code, k_region[j] = T(region), k_source[j] = k_token[j] = token, k_term[j] = 0;
        if (token < 0) {
          k_source[j] = a.edge_row ? kExtra : kExcluded;
          k_term[j] = a.edge_row ? T(0) : -infinite;
          terms = terms || !a.edge_row;
        } else if (key_bias) {
          k_term[j] = key_bias[token] * unit;
          if (k_term[j] == -infinite) k_source[j] = kExcluded;
        }
        k_special = k_special || k_source[j] < 0;
      });
  nk = box + a.n_extra - a.edge_row;
  k_special = k_special || nk > box;
  for (int32_t j = box; j < nk; ++j)
    k_source[j] = kExtra - (a.edge_row + j - box), k_token[j] = -1, k_code[j] = 0, k_term[j] = 0;
  regions = (r.flags & kRowRegions) != 0;
  key_terms = terms;
}

}  // namespace vicinal::VICINAL_ISA
