// What the attention kernels share beyond tiles: the logit of a pair of slots, dropout, and the gradient of a
// pair.
#pragma once

#include "ranges.cuh"

namespace vicinal::cuda {

// What the logits of one window and head need.
struct Logits {
  const float *bias, *mask;  // bias of the head; mask [q_slots, k_slots] of the window and head, or null
  float scale, mask_value;
  int32_t mask_keys;  // slots of the key box: extra rows have no mask
  int32_t guard;      // of a row with ranges, otherwise 0
  bool softmax;

  __device__ Logits(const Attend& a, const Window& w)
      : bias(nullptr),
        mask(nullptr),
        scale(static_cast<float>(a.scale)),
        mask_value(static_cast<float>(a.mask_value)),
        mask_keys(a.plan.k_slots),
        guard(a.plan.rows[w.row].flags & kRowRanges ? a.plan.guard : 0),
        softmax(a.activation == kSoftmax) {
    if (a.bias) bias = static_cast<const float*>(a.bias) + w.head * a.bias_size;
    if (a.mask) {
      const int64_t window = (w.batch * a.plan.n_rows + w.row) % a.mask_count;
      mask = static_cast<const float*>(a.mask) + window * a.mask_stride_w + w.head * a.mask_stride_h;
    }
  }

  // s of query slot i and key slot j; -inf where the pair is excluded.
  __device__ float operator()(float dot, const QuerySlot& q, const KeySlot& k, int i, int j) const {
    if (k.token == kNone || q.token == kNone) return minus_infinity();
    const bool in_box = k.region >= 0;
    if (guard && in_box && !visible(q.region, q.coord, k.coord, guard)) return minus_infinity();
    float s = fmaf(dot, scale * q.scale * k.scale, k.add);
    if (bias) s += bias[in_box ? bias_index(q.code, k.code) : k.code];
    if (!in_box) return s;
    if (mask) s += mask[static_cast<int64_t>(i) * mask_keys + j];
    if (!guard && crosses(q.region, k.region)) s = softmax ? s + mask_value : minus_infinity();
    return s;
  }
};

// The words of slots `slot` (even) and slot + 1 of one query. Not inlined: its ten rounds in every unrolled
// element would be most of a kernel's code.
static __device__ __noinline__ uint2 dropout_pair(uint64_t seed, uint32_t batch_head, int32_t token,
                                                  int slot) {
  const Philox4 words = dropout_words(seed, slot / 4, token, batch_head);
  return slot % 4 == 2 ? make_uint2(words.x[2], words.x[3]) : make_uint2(words.x[0], words.x[1]);
}

// Factors keep / (1 - p) of one sample and head.
struct Dropout {
  uint64_t seed = 0;
  uint32_t batch_head = 0, threshold = 0;
  int32_t n_k = -1;  // tokens of k where the words are those of key tokens, not slots
  float kept = 1.0f;

  __device__ Dropout(const Attend& a, int64_t batch, int head) {
    threshold = dropout_threshold(a.dropout_p);
    if (!threshold) return;
    seed = static_cast<uint64_t>(*a.seed);
    if (a.drop_by_token) n_k = static_cast<int32_t>(a.n_k);
    kept = static_cast<float>(1.0 / (1.0 - a.dropout_p));
    set_head(a, batch, head);
  }

  __device__ void set_head(const Attend& a, int64_t batch, int head) {
    batch_head = static_cast<uint32_t>(batch * a.head_total + a.head_offset + head);
  }

  __device__ bool on() const { return threshold != 0; }
  __device__ float factor(uint32_t word) const { return word >= threshold ? kept : 0.0f; }

  // The key slots `slot` (even) and slot + 1 of one query.
  __device__ float2 pair(int32_t token, int slot, const KeySlot& first, const KeySlot& second) const {
    if (n_k >= 0) return {word(token, key(first)), word(token, key(second))};
    const uint2 words = dropout_pair(seed, batch_head, token, slot);
    return {factor(words.x), factor(words.y)};
  }

  __device__ float one(int32_t token, int slot, const KeySlot& k) const {
    return word(token, n_k >= 0 ? key(k) : slot);
  }

 private:
  __device__ int key(const KeySlot& k) const { return k.token >= 0 ? k.token : n_k + kExtra - k.token; }
  __device__ float word(int32_t token, int at) const {
    const uint2 words = dropout_pair(seed, batch_head, token, at / 2 * 2);
    return factor(at % 2 ? words.y : words.x);
  }
};

__device__ inline float activated(Activation activation, float s) {
  if (s == minus_infinity()) return 0.0f;
  if (activation == kIdentity) return s;
  const float r = s < 0.0f ? 0.0f : s;  // keeps NaN
  return activation == kRelu ? r : r * r;
}

// Weight of a pair after dropout, and the gradient of its logit. dp = dout_i . v_j.
struct PairGrad {
  float p, ds;
};

__device__ inline PairGrad pair_grad(Activation activation, float s, float dp, float z, const QuerySlot& q) {
  if (s == minus_infinity()) return {0.0f, 0.0f};
  if (activation == kSoftmax) {
    const float p = simt::ex2((s - q.lse) * kLog2E);
    return {p * z, p * (z * dp - q.delta)};
  }
  const float p = activated(activation, s);
  const float slope = activation == kIdentity ? 1.0f
                      : s <= 0.0f             ? 0.0f
                      : activation == kRelu   ? 1.0f
                                              : 2.0f * s;
  return {p * z, slope * z * dp};
}

}  // namespace vicinal::cuda
