// Philox4x32-10, a counter-based random generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
// Dropout is a function of (seed, logical element index e) and nothing else, so that every backend drops the same
// elements and the backward replays the mask: counter = e / 4, key = seed, word e % 4; an element is kept where its
// word >= floor(p 2^32). pyfast/philox.py is the same in torch.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define PF_HOST_DEVICE __host__ __device__
#else
#define PF_HOST_DEVICE
#endif

namespace pyfast {
namespace {  // internal linkage: compiled once per instruction set

// The 4 words of each of N consecutive blocks: words[4 i + w] belongs to logical index 4 (block + i) + w. The loops
// over N are written to be vectorised; N = 1 is the scalar form.
template <int N>
PF_HOST_DEVICE inline void philox4x32(uint64_t seed, uint64_t block, uint32_t* words) {
  constexpr uint32_t kMul0 = 0xD2511F53, kMul1 = 0xCD9E8D57, kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  uint32_t c0[N], c1[N], c2[N], c3[N], key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int i = 0; i < N; ++i) {
    c0[i] = uint32_t(block + i);
    c1[i] = uint32_t((block + i) >> 32);
    c2[i] = c3[i] = 0;
  }
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < N; ++i) {
      uint64_t p0 = uint64_t(kMul0) * c0[i], p1 = uint64_t(kMul1) * c2[i];
      c0[i] = uint32_t(p1 >> 32) ^ c1[i] ^ key0;
      c2[i] = uint32_t(p0 >> 32) ^ c3[i] ^ key1;
      c1[i] = uint32_t(p1);
      c3[i] = uint32_t(p0);
    }
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  for (int i = 0; i < N; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

// words[i] of logical indices begin .. begin + count - 1, for any begin and count
inline void philox_words(uint64_t seed, uint64_t begin, int64_t count, uint32_t* words) {
  constexpr int N = 16;
  uint32_t buffer[4 * N];
  int64_t i = 0;
  if (begin % 4) {
    philox4x32<1>(seed, begin / 4, buffer);
    for (uint64_t w = begin % 4; w < 4 && i < count; ++w) words[i++] = buffer[w];
  }
  for (; i + 4 * N <= count; i += 4 * N) philox4x32<N>(seed, (begin + i) / 4, words + i);
  if (i < count) {
    philox4x32<N>(seed, (begin + i) / 4, buffer);
    for (int w = 0; i < count; ++w) words[i++] = buffer[w];
  }
}

// Dropout with 0 <= p < 1: kept where word >= threshold, and then scaled by 1 / (1 - p).
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  float scale;
  PF_HOST_DEVICE Dropout(double p, uint64_t seed)
      : seed(seed), threshold(uint32_t(p * 4294967296.0)), scale(float(1.0 / (1.0 - p))) {}

  PF_HOST_DEVICE float factor(uint32_t word) const { return word >= threshold ? scale : 0.f; }

  // factor of one logical index
  PF_HOST_DEVICE float at(uint64_t e) const {
    uint32_t words[4];
    philox4x32<1>(seed, e / 4, words);
    return factor(words[e % 4]);
  }

  // factors of count consecutive logical indices
  void fill(uint64_t begin, int64_t count, float* factors) const {
    uint32_t words[64];
    while (count > 0) {
      int64_t n = count < 64 ? count : 64;
      philox_words(seed, begin, n, words);
      for (int64_t i = 0; i < n; ++i) factors[i] = factor(words[i]);
      begin += n, factors += n, count -= n;
    }
  }
};

}  // namespace
}  // namespace pyfast
