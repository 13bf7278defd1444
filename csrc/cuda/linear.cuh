// Device side of linear attention (csrc/linear.h has the formula): runs of tokens, operands as tiles, decays.
//
// Everything is cut to tiles of kSide tokens by kSide channels, so that any width will do. An operand is one
// of f, p, v, r of linear.h: its tile is read from memory of any strides and type, mapped, and rounded to the
// type T that products take: bf16, tf32 (float16) or float. Where nothing is to be done to it on the way, it
// is copied with cp.async.
#pragma once

#include "../feature_map.h"
#include "launch.cuh"

namespace vicinal::cuda {

constexpr int kSide = 64;     // tokens, features or values of a tile
constexpr int kRunTiles = 4;  // most tiles of a run whose tokens see each other

// Which keys a query sees: all of its sequence, whole blocks longer than a tile, or those of its run up to
// itself (or its block's end) besides the sums of the runs before.
enum Scope : int32_t { kReadAll, kReadBlocks, kWithin };

// How a side's tokens are cut: sequences into periods, those into runs, those into tiles. The runs of all
// sequences have slots; where lengths are on the device alone, some slots stay empty.
struct LinearRuns {
  const int32_t* cu_seqlens;
  int64_t sequences, tokens, period, slots_each, slots;  // tokens: of a sample
  int32_t pieces, run, tile;                             // runs of a period, tokens of a run and of a tile
};

struct Span {
  int64_t sample, begin, count, slot;
};

__device__ inline Span span_of(const LinearRuns& r, int64_t sequence) {
  if (!r.cu_seqlens) return {sequence, 0, r.tokens, sequence * r.slots_each};
  const int64_t begin = r.cu_seqlens[sequence];
  // Sequences may start anywhere: ceil((b - a) / P) <= b / P - a / P + 1 leaves each the room it needs.
  return {0, begin, r.cu_seqlens[sequence + 1] - begin, (begin / r.period + sequence) * r.pieces};
}

__host__ __device__ inline int64_t slots_of(const LinearRuns& r, int64_t count) {
  return count / r.period * r.pieces + (count % r.period + r.run - 1) / r.run;
}

struct Run {
  int64_t sequence, slot, length;  // tokens of the sequence
  int64_t sample, begin, first;    // its first token, of the sample and of the sequence
  int32_t count, piece;
};

__device__ inline Run run_of(const LinearRuns& r, int64_t slot) {
  int64_t low = 0, high = r.sequences;
  if (!r.cu_seqlens) {
    low = slot / r.slots_each;
  } else {
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (span_of(r, middle).slot <= slot ? low : high) = middle;
    }
  }
  const Span span = span_of(r, low);
  const int64_t local = slot - span.slot;
  Run run{};
  run.sequence = low, run.slot = slot, run.length = span.count, run.sample = span.sample;
  run.piece = static_cast<int32_t>(local % r.pieces);
  run.first = local / r.pieces * r.period + int64_t{run.piece} * r.run;
  run.begin = span.begin + run.first;
  int64_t count = span.count - run.first;
  if (count > r.period - int64_t{run.piece} * r.run) count = r.period - int64_t{run.piece} * r.run;
  if (count > r.run) count = r.run;
  run.count = count < 0 || local < 0 ? 0 : static_cast<int32_t>(count);
  return run;
}

struct Tokens {
  int64_t sample, begin, first;
  int32_t count;
};

__device__ inline Tokens tokens_of(const LinearRuns& r, const Run& run, int tile) {
  const int at = tile * r.tile;
  return {run.sample, run.begin + at, run.first + at, smaller(r.tile, run.count - at)};
}

// Sums s [K][dim_v] and z [Kd] (none where not normalised).
struct Sums {
  const float *s, *z;
};

// The sums of every run and head, and those at the far end of each sequence: of all tokens forwards, the
// gradient of the initial state backwards.
struct States {
  float* runs;
  const float *end_s, *end_z;
  int64_t s_size, z_size;
  int32_t heads;

  __device__ float* of_run(int64_t slot, int head) const {
    return runs + (slot * heads + head) * (s_size + z_size);
  }
  __device__ Sums at(int64_t slot, int head) const {
    const float* s = of_run(slot, head);
    return {s, s + s_size};
  }
  __device__ Sums end(int64_t sequence, int head) const {
    const int64_t index = sequence * heads + head;
    return {end_s + index * s_size, end_z + index * z_size};
  }
};

// The sums that the tokens of a run read besides the run itself; backwards: the gradients that its keys get.
__device__ inline Sums sums_for(const States& x, const LinearRuns& r, Scope scope, bool inclusive,
                                bool backwards, const Run& run, int head) {
  if (scope == kReadAll) return x.end(run.sequence, head);
  if (scope == kWithin) return x.at(run.slot, head);
  const int64_t slot = run.slot - run.piece, begin = run.first - int64_t{run.piece} * r.run;
  const int64_t left = run.length - begin;
  if (!backwards && !inclusive) return x.at(slot, head);
  if (!backwards) return left <= r.period ? x.end(run.sequence, head) : x.at(slot + r.pieces, head);
  if (inclusive) return begin == 0 ? x.end(run.sequence, head) : x.at(slot - 1, head);
  return x.at(slot + slots_of(r, left < r.period ? left : r.period) - 1, head);
}

// f, p, v, r, or one of the features of the denominator.
struct Operand {
  Strided x;
  DType dtype;
  FeatureMap map;
  int32_t dim, width;  // width: one more than dim with a constant channel
  int32_t shared;      // heads that read one of x
  float param, factor, constant;
  bool keys, scaled;  // rows of ignored keys are 0; rows are divided by den
  int32_t align;      // bytes to which rows are aligned, 0: channels are not contiguous
};

__device__ __forceinline__ float load_value(const void* data, DType dtype, int64_t at) {
  if (dtype == kBF16) return widened(static_cast<const bf16*>(data)[at]);
  if (dtype == kF16) return widened(static_cast<const half*>(data)[at]);
  return static_cast<const float*>(data)[at];
}

__device__ inline void store_value(const Strided& x, DType dtype, int64_t at, float value) {
  if (dtype == kBF16) {
    static_cast<bf16*>(x.data)[at] = rounded<bf16>(value);
  } else if (dtype == kF16) {
    static_cast<half*>(x.data)[at] = rounded<half>(value);
  } else {
    static_cast<float*>(x.data)[at] = value;
  }
}

template <class To>
__device__ __forceinline__ void copy_bits(To& to, const void* from) {
  memcpy(&to, from, sizeof to);
}

// Four values from memory that is aligned to four of them.
__device__ __forceinline__ void load_four(float (&x)[4], const void* data, DType dtype, int64_t at) {
  if (dtype == kF32) {
    const float4 y = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + at);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
    return;
  }
  const uint2 y = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + at);
  const uint32_t pairs[2] = {y.x, y.y};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (dtype == kBF16) {
      const uint32_t bits[2] = {pairs[i] << 16, pairs[i] & 0xffff0000u};
      copy_bits(x[2 * i], &bits[0]);
      copy_bits(x[2 * i + 1], &bits[1]);
    } else {
      __half_raw low, high;
      low.x = static_cast<unsigned short>(pairs[i] & 0xffffu),
      high.x = static_cast<unsigned short>(pairs[i] >> 16);
      const float2 values{__half2float(half(low)), __half2float(half(high))};
      x[2 * i] = values.x, x[2 * i + 1] = values.y;
    }
  }
}

struct Exp2 {
  __device__ float operator()(float x) const { return simt::ex2(x); }
};

template <FeatureMap kMap>
__device__ __forceinline__ float2 value_and_slope(float x, float param) {
  const float value = feature<kMap>(x, param, Exp2());
  return {value, feature_slope<kMap>(x, value, param)};
}
// phi(x) and phi'(x). Not inlined: in every unrolled element the five maps would be most of a kernel's code.
static __device__ __noinline__ float2 mapped(FeatureMap map, float param, float x) {
  switch (map) {
    case kMapElu1:
      return value_and_slope<kMapElu1>(x, param);
    case kMapRelu:
      return value_and_slope<kMapRelu>(x, param);
    case kMapRelu2:
      return value_and_slope<kMapRelu2>(x, param);
    case kMapExp:
      return value_and_slope<kMapExp>(x, param);
    default:
      return value_and_slope<kMapIdentity>(x, param);
  }
}

// The same of four values, times a factor.
__device__ __forceinline__ void map_four(float (&x)[4], FeatureMap map, float param, float factor) {
  const auto all = [&](auto phi) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = factor * phi(x[e]);
  };
  switch (map) {
    case kMapElu1:
      return all([&](float y) { return feature<kMapElu1>(y, param, Exp2()); });
    case kMapRelu:
      return all([&](float y) { return feature<kMapRelu>(y, param, Exp2()); });
    case kMapRelu2:
      return all([&](float y) { return feature<kMapRelu2>(y, param, Exp2()); });
    case kMapExp:
      return all([&](float y) { return feature<kMapExp>(y, param, Exp2()); });
    default:
      return all([](float y) { return y; });
  }
}

__device__ __forceinline__ int64_t offset_of(const Strided& x, int64_t sample, int64_t token, int head) {
  return sample * x.stride_b + token * x.stride_n + head * x.stride_h;
}

template <class T>
constexpr int kRow = kSide + 16 / static_cast<int>(sizeof(T));  // elements between rows of a tile

__device__ inline int up_to_16(int n) { return (n + 15) / 16 * 16; }
// Channels of a slice, rounded up to 16.
__device__ inline int slice_width(int width, int slice) {
  return up_to_16(smaller(kSide, width - slice * kSide));
}

template <class T>
__device__ __forceinline__ void store_four(T* to, const float (&x)[4]) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint2*>(to) = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3])};
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = rounded<T>(x[e]);
  }
}

// Channels of slice `slice` of an operand's tokens: a tile whose rows and columns are zero up to the next 16.
// `factors`: one per row, 0: the row is not read; or null. Complete after `arrive`.
// Not inlined: kernels read a dozen tiles.
template <class T>
__device__ __noinline__ void read_tile(T* tile, const Operand& o, const Tokens& t, int head, int slice,
                                       const float* factors) {
  constexpr DType kSame = std::is_same_v<T, bf16> ? kBF16 : kF32;
  const int rows = up_to_16(t.count), cols = slice_width(o.width, slice), quads = cols / 4;
  const int64_t base = offset_of(o.x, t.sample, t.begin, head / o.shared);
  if constexpr (!std::is_same_v<T, tf32>) {
    if (!factors && o.align && o.dtype == kSame && o.map == kMapIdentity && o.factor == 1.0f &&
        o.width == o.dim) {
      constexpr int kChunk = 16 / sizeof(T);
      const T* data = static_cast<const T*>(o.x.data);
      for (int i = threadIdx.x; i < rows * (cols / kChunk); i += blockDim.x) {
        const int row = i / (cols / kChunk), col = i % (cols / kChunk) * kChunk;
        const int left = row < t.count ? o.dim - slice * kSide - col : 0;
        const T* from = left > 0 ? data + base + row * o.x.stride_n + slice * kSide + col : data;
        load_chunk(tile + row * kRow<T> + col, from,
                   (left < 0        ? 0
                    : left < kChunk ? left
                                    : kChunk) *
                       static_cast<int>(sizeof(T)),
                   o.align);
      }
      return;
    }
  }
  const bool by_token = o.x.stride_n == 1;
  const bool fours = o.align >= (o.dtype == kF32 ? 16 : 8);
  for (int i = threadIdx.x; i < rows * quads; i += blockDim.x) {
    const int row = by_token ? i % rows : i / quads, col = (by_token ? i / rows : i % quads) * 4;
    const int channel = slice * kSide + col;
    const float by = row >= t.count ? 0.0f : factors ? factors[row] : 1.0f;
    float x[4] = {};
    if (by != 0.0f) {
      const int64_t at = base + row * o.x.stride_n + channel * o.x.stride_d;
      if (fours && channel + 4 <= o.dim) {
        load_four(x, o.x.data, o.dtype, at);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (channel + e < o.dim) x[e] = load_value(o.x.data, o.dtype, at + e * o.x.stride_d);
        }
      }
      map_four(x, o.map, o.param, o.factor * by);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (channel + e >= o.dim) x[e] = channel + e < o.width ? by * o.constant : 0.0f;
      }
    }
    store_four(tile + row * kRow<T> + col, x);
  }
}

// rows x cols of s (a matrix [.., width]) from (row0, col0) on, zero up to the next 16.
template <class T>
__device__ __noinline__ void read_sums(T* tile, const float* s, int rows, int cols, int width, int row0,
                                       int col0) {
  rows = smaller(kSide, rows - row0);
  cols = smaller(kSide, cols - col0);
  const int wide = up_to_16(cols);
  for (int i = threadIdx.x; i < up_to_16(rows) * wide; i += blockDim.x) {
    const int row = i / wide, col = i % wide;
    const bool there = row < rows && col < cols;
    tile[row * kRow<T> + col] =
        rounded<T>(there ? s[static_cast<int64_t>(row0 + row) * width + col0 + col] : 0.0f);
  }
}

// All tiles that were read are there.
__device__ inline void arrive() {
  simt::cp_async_commit();
  simt::cp_async_wait<0>();
  simt::sync_threads();
}

__device__ inline float inverse_of(float den) {
  return fabsf(den) < static_cast<float>(kSmallestDen) ? 0.0f : 1.0f / den;
}

// The log-decays of a run and head: within its tiles, so that no sum of more than kSide of them is rounded.
struct Decays {
  float *up, *down, *totals;  // from the tile's start up to a token, from it to the tile's end; of a tile
  bool on;

  __device__ void load(const Linear& a, const LinearRuns& r, const Run& run, int head) const {
    if (!on) return;
    const float* g = static_cast<const float*>(a.decay) + run.sample * a.decay_stride_b +
                     run.begin * a.decay_stride_n + head * a.decay_stride_h;
    const int lane = threadIdx.x % 32, tile = threadIdx.x / 32, at = tile * r.tile + 2 * lane;
    float x[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = 2 * lane + i < r.tile && at + i < run.count;
      x[i] = there ? g[(at + i) * a.decay_stride_n] : 0.0f;
    }
    float sum = x[0] + x[1];
    for (int step = 1; step < 32; step *= 2) {
      const float before = simt::shfl(sum, (lane - step) & 31);
      if (lane >= step) sum += before;
    }
    const float total = simt::shfl(sum, 31);
    const float values[2] = {sum - x[1], sum};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      up[tile * kSide + 2 * lane + i] = values[i];
      down[tile * kSide + 2 * lane + i] = total - values[i];
    }
    if (lane == 0) totals[tile] = total;
  }
  // Of the tiles from `first` to before `last`.
  __device__ float sum(int first, int last) const {
    float x = 0.0f;
    for (int i = first; i < last; ++i) x += totals[i];
    return x;
  }
  __device__ static float exp(float x) { return simt::ex2(x * kLog2E); }
  // From the run's start up to and with a token; from after a token to the run's end.
  __device__ float from_start(int tile, int i) const {
    return on ? exp(sum(0, tile) + up[tile * kSide + i]) : 1.0f;
  }
  __device__ float to_end(int tile, int i) const {
    return on ? exp(down[tile * kSide + i] + sum(tile + 1, kRunTiles)) : 1.0f;
  }
};

// What the rows of a tile are multiplied by (0 and 1 for keys, 1 / den for queries), and d of queries.
struct TokenNumbers {
  const float *den, *dots;  // null: not normalised. dots [parts, B, heads, n_q]: num_i . r_i
  int32_t parts;

  __device__ void load(const Linear& a, const Tokens& t, int head, bool queries, float* factors,
                       float* slopes) const {
    for (int i = threadIdx.x; i < kSide; i += blockDim.x) {
      float factor = i < t.count ? 1.0f : 0.0f, slope = 0.0f;
      if (i < t.count && !queries && a.key_mask) {
        factor = a.key_mask[t.sample * a.n_k + t.begin + i] ? 0.0f : 1.0f;
      }
      if (i < t.count && queries && den) {
        const int64_t at = (t.sample * a.heads + head) * a.n_q + t.begin + i;
        factor = inverse_of(den[at]);
        for (int part = 0; dots && part < parts; ++part) {
          slope -= dots[part * a.batch * a.heads * a.n_q + at];
        }
        slope *= factor;
      }
      factors[i] = factor;
      if (slopes) slopes[i] = slope;
    }
  }
};

__device__ inline bool needs_factors(const Linear& a, const Operand& o) {
  return o.scaled || (o.keys && a.key_mask);
}

}  // namespace vicinal::cuda
