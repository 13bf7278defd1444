// Keys of voxels and their stable sort. Keys are signed 4 or 8 byte integers, never negative.
#pragma once
#include <cstdint>

namespace vicinal::cpu {

// keys[i] = the sum over the fields f of table_f[coords[i * stride + columns[f]]]; table_f, of sizes[f]
// entries, follows table_(f-1) in `tables`. A coordinate outside its table adds nothing; returns the first
// row that has one, or -1.
int64_t pack_keys(const void* coords, int coord_bytes, int64_t n, int64_t stride, int fields,
                  const int64_t* columns, const int64_t* sizes, const int64_t* tables, void* keys,
                  int key_bytes, int threads);

// Places on the Hilbert curve of `depth` bits per axis, at most 20.
void hilbert_codes(const int32_t* x, const int32_t* y, const int32_t* z, int64_t* codes, int64_t n, int depth,
                   int threads);

// order [n] and sorted [n]: the stable ascending order of keys below 2^bits.
void sort_keys(const void* keys, int key_bytes, int64_t n, int bits, int32_t* order, void* sorted,
               int threads);

struct Runs {
  int64_t count, equal;  // runs; a place whose key equals the one before it, or -1
};

// to [n + 1]: where the runs of equal key >> shift begin, then n.
Runs run_starts(const void* sorted, int key_bytes, int64_t n, int shift, int32_t* to);

}  // namespace vicinal::cpu
