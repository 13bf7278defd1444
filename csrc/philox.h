// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3, SC 2011): dropout
// bits that depend on (seed, batch and head, query token, key slot) alone, so that every backend and both
// passes draw the same.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define VICINAL_HD __host__ __device__ __forceinline__
#else
#define VICINAL_HD inline
#endif

namespace vicinal {

struct Philox4 {
  uint32_t x[4];
};

VICINAL_HD Philox4 philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
    const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Four decisions at once: slots 4 * group .. 4 * group + 3 of one query. A slot is kept iff its
// word >= threshold.
VICINAL_HD Philox4 dropout_words(uint64_t seed, uint32_t group, uint32_t query_token, uint32_t batch_head) {
  return philox(seed, group, query_token, batch_head, 0u);
}

// p in [0, 1): words below p * 2^32 are dropped.
VICINAL_HD uint32_t dropout_threshold(double p) {
  const double t = p * 4294967296.0;
  return t >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(t);
}

}  // namespace vicinal
