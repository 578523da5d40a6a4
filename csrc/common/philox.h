// Philox4x32-10, a counter-based random generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
// Dropout is a function of (seed, logical element index e) and nothing else, so that every backend drops the same
// elements and the backward replays the mask: counter = e / 4, key = seed, word e % 4; an element is kept where its
// word >= floor(p 2^32). pyfast/philox.py is the same in torch.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

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

#if defined(__AVX2__) && !defined(__CUDACC__)
// The same for as many blocks as a register has 64-bit lanes. A lane holds one counter word in its low half; what
// gathers in the high half is never read, since the multiplication takes the low halves alone.
#if defined(__AVX512F__)
constexpr int kPhiloxLanes = 8;
using PhiloxLanes = __m512i;
inline PhiloxLanes philox_fill(uint64_t x) { return _mm512_set1_epi64(int64_t(x)); }
inline PhiloxLanes philox_iota() { return _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0); }
inline PhiloxLanes philox_add(PhiloxLanes a, PhiloxLanes b) { return _mm512_add_epi64(a, b); }
inline PhiloxLanes philox_multiply(PhiloxLanes a, PhiloxLanes b) { return _mm512_mul_epu32(a, b); }
inline PhiloxLanes philox_high(PhiloxLanes a) { return _mm512_srli_epi64(a, 32); }
inline PhiloxLanes philox_xor(PhiloxLanes a, PhiloxLanes b, PhiloxLanes c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
inline PhiloxLanes philox_block(PhiloxLanes index) { return _mm512_srli_epi64(index, 2); }
// lane by lane, the word index % 4 of the four
inline PhiloxLanes philox_select(PhiloxLanes index, PhiloxLanes w0, PhiloxLanes w1, PhiloxLanes w2, PhiloxLanes w3) {
  __m512i odd = _mm512_slli_epi64(index, 63), upper = _mm512_slli_epi64(index, 62);
  __mmask8 o = _mm512_movepi64_mask(odd), u = _mm512_movepi64_mask(upper);
  return _mm512_mask_blend_epi64(u, _mm512_mask_blend_epi64(o, w0, w1), _mm512_mask_blend_epi64(o, w2, w3));
}
// kept where word >= threshold, else 0
inline void philox_factors(PhiloxLanes words, uint32_t threshold, float kept, float* factors) {
  __m256i w = _mm512_cvtepi64_epi32(words);
  __mmask8 keep = _mm256_cmpge_epu32_mask(w, _mm256_set1_epi32(int32_t(threshold)));
  _mm256_storeu_ps(factors, _mm256_maskz_mov_ps(keep, _mm256_set1_ps(kept)));
}
inline void philox_store(PhiloxLanes c0, PhiloxLanes c1, PhiloxLanes c2, PhiloxLanes c3, uint32_t* words) {
  __m512i even = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32));
  __m512i odd = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
  const __m512i first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), last = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  _mm512_storeu_si512(words, _mm512_permutex2var_epi64(even, first, odd));
  _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi64(even, last, odd));
}
#else
constexpr int kPhiloxLanes = 4;
using PhiloxLanes = __m256i;
inline PhiloxLanes philox_fill(uint64_t x) { return _mm256_set1_epi64x(int64_t(x)); }
inline PhiloxLanes philox_iota() { return _mm256_set_epi64x(3, 2, 1, 0); }
inline PhiloxLanes philox_add(PhiloxLanes a, PhiloxLanes b) { return _mm256_add_epi64(a, b); }
inline PhiloxLanes philox_multiply(PhiloxLanes a, PhiloxLanes b) { return _mm256_mul_epu32(a, b); }
inline PhiloxLanes philox_high(PhiloxLanes a) { return _mm256_srli_epi64(a, 32); }
inline PhiloxLanes philox_xor(PhiloxLanes a, PhiloxLanes b, PhiloxLanes c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
inline PhiloxLanes philox_block(PhiloxLanes index) { return _mm256_srli_epi64(index, 2); }
inline PhiloxLanes philox_select(PhiloxLanes index, PhiloxLanes w0, PhiloxLanes w1, PhiloxLanes w2, PhiloxLanes w3) {
  __m256d odd = _mm256_castsi256_pd(_mm256_slli_epi64(index, 63));
  __m256d upper = _mm256_castsi256_pd(_mm256_slli_epi64(index, 62));
  auto pick = [](__m256i a, __m256i b, __m256d second) {
    return _mm256_castpd_si256(_mm256_blendv_pd(_mm256_castsi256_pd(a), _mm256_castsi256_pd(b), second));
  };
  return pick(pick(w0, w1, odd), pick(w2, w3, odd), upper);
}
inline void philox_factors(PhiloxLanes words, uint32_t threshold, float kept, float* factors) {
  __m256i low = _mm256_permutevar8x32_epi32(words, _mm256_set_epi32(0, 0, 0, 0, 6, 4, 2, 0));
  __m128i w = _mm256_castsi256_si128(low), limit = _mm_set1_epi32(int32_t(threshold));
  __m128i keep = _mm_cmpeq_epi32(_mm_max_epu32(w, limit), w);
  _mm_storeu_ps(factors, _mm_and_ps(_mm_castsi128_ps(keep), _mm_set1_ps(kept)));
}
inline void philox_store(PhiloxLanes c0, PhiloxLanes c1, PhiloxLanes c2, PhiloxLanes c3, uint32_t* words) {
  __m256i even = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  __m256i odd = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  __m256i low = _mm256_unpacklo_epi64(even, odd), high = _mm256_unpackhi_epi64(even, odd);
  _mm256_storeu_si256((__m256i*)words, _mm256_permute2x128_si256(low, high, 0x20));
  _mm256_storeu_si256((__m256i*)(words + 8), _mm256_permute2x128_si256(low, high, 0x31));
}
#endif

// The words of the blocks c0 (their numbers, one per lane), in the low halves of c0 to c3. M registers at a time: each
// of their chains waits for its own multiplications, and together they do not.
template <int M>
inline void philox_rounds(uint64_t seed, PhiloxLanes* c0, PhiloxLanes* c1, PhiloxLanes* c2, PhiloxLanes* c3) {
  const PhiloxLanes mul0 = philox_fill(0xD2511F53), mul1 = philox_fill(0xCD9E8D57);
  for (int m = 0; m < M; ++m) {
    c1[m] = philox_high(c0[m]);
    c2[m] = c3[m] = philox_fill(0);
  }
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const PhiloxLanes k0 = philox_fill(key0), k1 = philox_fill(key1);
    for (int m = 0; m < M; ++m) {
      PhiloxLanes p0 = philox_multiply(c0[m], mul0), p1 = philox_multiply(c2[m], mul1);
      c0[m] = philox_xor(philox_high(p1), c1[m], k0);
      c2[m] = philox_xor(philox_high(p0), c3[m], k1);
      c1[m] = p1;
      c3[m] = p0;
    }
    key0 += 0x9E3779B9, key1 += 0xBB67AE85;
  }
}

template <int M>
inline void philox4x32_lanes(uint64_t seed, uint64_t block, uint32_t* words) {
  PhiloxLanes c0[M], c1[M], c2[M], c3[M];
  for (int m = 0; m < M; ++m) c0[m] = philox_add(philox_fill(block + m * kPhiloxLanes), philox_iota());
  philox_rounds<M>(seed, c0, c1, c2, c3);
  for (int m = 0; m < M; ++m) philox_store(c0[m], c1[m], c2[m], c3[m], words + 4 * kPhiloxLanes * m);
}
#endif

// words[i] of logical indices begin .. begin + count - 1, for any begin and count
inline void philox_words(uint64_t seed, uint64_t begin, int64_t count, uint32_t* words) {
  constexpr int N = 16;
  uint32_t buffer[4 * N];
  int64_t i = 0;
  if (begin % 4) {
    philox4x32<1>(seed, begin / 4, buffer);
    for (uint64_t w = begin % 4; w < 4 && i < count; ++w) words[i++] = buffer[w];
  }
#if defined(__AVX2__) && !defined(__CUDACC__)
  constexpr int kWords = 4 * kPhiloxLanes, M = kPhiloxLanes == 8 ? 4 : 2;  // as many as the registers hold
  for (; i + M * kWords <= count; i += M * kWords) philox4x32_lanes<M>(seed, (begin + i) / 4, words + i);
  for (; i + kWords <= count; i += kWords) philox4x32_lanes<1>(seed, (begin + i) / 4, words + i);
#else
  for (; i + 4 * N <= count; i += 4 * N) philox4x32<N>(seed, (begin + i) / 4, words + i);
#endif
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
    constexpr int64_t kStep = 512;
    uint32_t words[kStep];
    const Dropout local = *this;  // factors may not alias it: the loop below becomes vectors
    while (count > 0) {
      int64_t n = count < kStep ? count : kStep;
      philox_words(seed, begin, n, words);
      for (int64_t i = 0; i < n; ++i) factors[i] = local.factor(words[i]);
      begin += n, factors += n, count -= n;
    }
  }

#if defined(__AVX2__) && !defined(__CUDACC__)
  // factors[j * ld + i] of the logical index begin + i * step + j, for j < count and i < rows, ld (a multiple of the
  // lanes) or fewer: each lane follows one row
  void fill_transposed(uint64_t begin, uint64_t step, int64_t rows, int64_t count, float* factors, int64_t ld) const {
    constexpr int L = kPhiloxLanes, M = L == 8 ? 4 : 2;
    const bool aligned = begin % 4 == 0 && step % 4 == 0;  // else rows begin within a block of words
    for (int64_t i0 = 0; i0 < rows; i0 += L) {
      alignas(64) uint64_t first[L];
      for (int l = 0; l < L; ++l) first[l] = begin + (i0 + l) * step;
      PhiloxLanes index, c[4][M + 1];  // word w of block m: c[w][m]; of the blocks before and of M more
      std::memcpy(&index, first, sizeof index);
      PhiloxLanes block = philox_block(index);
      c[0][0] = block;
      philox_rounds<1>(seed, c[0], c[1], c[2], c[3]);
      for (int64_t j = 0; j < count; j += 4 * M) {
        for (int m = 1; m <= M; ++m) c[0][m] = block = philox_add(block, philox_fill(1));
        philox_rounds<M>(seed, c[0] + 1, c[1] + 1, c[2] + 1, c[3] + 1);
#pragma GCC unroll 16
        for (int x = 0; x < 4 * M; ++x) {
          if (j + x >= count) break;
          auto word = [&](int n) { return c[n % 4][n / 4]; };
          PhiloxLanes w = aligned ? word(x) : philox_select(index, word(x), word(x + 1), word(x + 2), word(x + 3));
          philox_factors(w, threshold, scale, factors + (j + x) * ld + i0);
        }
        for (auto& word : c) word[0] = word[M];
      }
    }
  }
#endif
};

}  // namespace
}  // namespace pyfast
