// fp32 vectors for one instruction set, on GCC's vector extensions: 16 lanes under AVX-512, 8 under AVX2.
// Every kernel source is compiled once per instruction set with PYFAST_ISA naming its namespace (avx2, avx512).
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "common/types.h"

#ifndef PYFAST_ISA
#error "PYFAST_ISA names the instruction set that this source is compiled for"
#endif

namespace pyfast::PYFAST_ISA {
namespace {  // internal linkage: the linker must never merge one instruction set's code with another's

#ifdef __AVX512F__
constexpr int VL = 16;
#else
constexpr int VL = 8;
#endif

typedef float fvec __attribute__((vector_size(VL * 4)));
typedef int32_t ivec __attribute__((vector_size(VL * 4)));
typedef uint32_t uvec __attribute__((vector_size(VL * 4)));
typedef uint16_t hvec __attribute__((vector_size(VL * 2)));

#define PF_INLINE __attribute__((always_inline)) inline

PF_INLINE fvec splat(float x) { return x - fvec{}; }

PF_INLINE float to_float(float x) { return x; }
PF_INLINE float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
PF_INLINE float to_float(fp16 x) { return _cvtsh_ss(x.bits); }

// Round to nearest even, as torch does; a NaN stays a NaN.
template <class T>
PF_INLINE T from_float(float x);
template <>
PF_INLINE float from_float<float>(float x) {
  return x;
}
template <>
PF_INLINE bf16 from_float<bf16>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (x != x) return {0x7fc0};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
PF_INLINE fp16 from_float<fp16>(float x) {
  return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
}

PF_INLINE fvec load(const float* p) {
  fvec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
PF_INLINE fvec load(const bf16* p) {  // intrinsics: GCC 12 widens 16-bit vectors by halves
#ifdef __AVX512F__
  return (fvec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  return (fvec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#endif
}
PF_INLINE fvec load(const fp16* p) {
#ifdef __AVX512F__
  return (fvec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  return (fvec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
}
PF_INLINE void store(float* p, fvec v) { std::memcpy(p, &v, sizeof v); }
PF_INLINE void store(bf16* p, fvec v) {
  uvec u = (uvec)v;
  uvec r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
#ifdef __AVX512F__
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  __m512i kept = _mm512_mask_mov_epi32((__m512i)r, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(kept));
#else
  __m256 nan = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  __m256i kept = _mm256_blendv_epi8((__m256i)r, _mm256_set1_epi32(0x7fc0), (__m256i)nan);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)));
#endif
}
PF_INLINE void store(fp16* p, fvec v) {
#ifdef __AVX512F__
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
}

// The first n < VL lanes; the others read as `fill` and are never touched in memory.
#ifdef __AVX512F__
PF_INLINE __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }
PF_INLINE fvec load_n(const float* p, int n, float fill = 0.f) {
  return (fvec)_mm512_mask_loadu_ps((__m512)splat(fill), first_lanes(n), p);
}
PF_INLINE void store_n(float* p, fvec v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v); }
#else
PF_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
PF_INLINE fvec load_n(const float* p, int n, float fill = 0.f) {
  __m256i lanes = first_lanes(n);
  return (fvec)_mm256_blendv_ps((__m256)splat(fill), _mm256_maskload_ps(p, lanes), (__m256)lanes);
}
PF_INLINE void store_n(float* p, fvec v, int n) { _mm256_maskstore_ps(p, first_lanes(n), (__m256)v); }
#endif
template <class T>
PF_INLINE fvec load_n(const T* p, int n, float fill = 0.f) {
  T buffer[VL];
  for (int i = 0; i < VL; ++i) buffer[i] = from_float<T>(fill);
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
PF_INLINE void store_n(T* p, fvec v, int n) {
  T buffer[VL];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

// Calls body(i, n) over [0, count) in steps of VL with n = VL, then once with the rest; load_any/store_any take such an
// n.
template <class T>
PF_INLINE fvec load_any(const T* p, int n, float fill = 0.f) {
  return n == VL ? load(p) : load_n(p, n, fill);
}
template <class T>
PF_INLINE void store_any(T* p, fvec v, int n) {
  n == VL ? store(p, v) : store_n(p, v, n);
}
template <class F>
PF_INLINE void for_lanes(int64_t count, F&& body) {
  int64_t i = 0;
  for (; i + VL <= count; i += VL) body(i, VL);
  if (i < count) body(i, int(count - i));
}

// a > b ? a : b and a < b ? a : b, in one instruction: b where either is NaN
PF_INLINE fvec max(fvec a, fvec b) {
#ifdef __AVX512F__
  return (fvec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return (fvec)_mm256_max_ps((__m256)a, (__m256)b);
#endif
}
PF_INLINE fvec min(fvec a, fvec b) {
#ifdef __AVX512F__
  return (fvec)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return (fvec)_mm256_min_ps((__m256)a, (__m256)b);
#endif
}
PF_INLINE float hsum(fvec v) {
  float s[VL];
  std::memcpy(s, &v, sizeof v);
  for (int step = VL / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) s[i] += s[i + step];
  return s[0];
}
PF_INLINE float hmax(fvec v) {
  float s[VL];
  std::memcpy(s, &v, sizeof v);
  for (int step = VL / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) s[i] = s[i] > s[i + step] ? s[i] : s[i + step];
  return s[0];
}

PF_INLINE fvec round_even(fvec x) {
#ifdef __AVX512F__
  return (fvec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (fvec)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
}

// x - n ln 2 for integral n: Cody and Waite's two parts of ln 2, the first of which has few bits
PF_INLINE fvec without_ln2(fvec x, fvec n) { return (x - n * 0.693359375f) - n * -2.12194440e-4f; }

// exp to about 1 ulp over the whole range: Cody-Waite reduction by ln 2 in two parts, then Cephes' degree-5 minimax
// polynomial. 2^n is applied by AVX-512's scalef, elsewhere as two factors, so that results near overflow and in the
// subnormals come out right; NaN passes through.
PF_INLINE fvec exp(fvec x) {
  x = min(splat(89.f), max(splat(-104.f), x));
  fvec n = round_even(x * 1.44269504088896341f);
  fvec r = without_ln2(x, n);
  fvec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
#ifdef __AVX512F__
  return (fvec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  ivec k = __builtin_convertvector(x == x ? n : fvec{}, ivec);
  ivec half = k >> 1;
  fvec a = (fvec)((half + 127) << 23), b = (fvec)((k - half + 127) << 23);
  return p * a * b;
#endif
}
// log to about 1 ulp for normal x > 0: Cephes' polynomial around 1. NaN passes through.
PF_INLINE fvec log(fvec x) {
  // x = m 2^e with m from sqrt(1/2) to sqrt(2)
  ivec bits = (ivec)x, e = (bits - 0x3f3504f3) >> 23;
  fvec n = __builtin_convertvector(e, fvec), z = (fvec)(bits - (e << 23)) - 1.f;
  fvec p = splat(7.0376836292e-2f);
  p = p * z - 1.1514610310e-1f;
  p = p * z + 1.1676998740e-1f;
  p = p * z - 1.2420140846e-1f;
  p = p * z + 1.4249322787e-1f;
  p = p * z - 1.6668057665e-1f;
  p = p * z + 2.0000714765e-1f;
  p = p * z - 2.4999993993e-1f;
  p = p * z + 3.3333331174e-1f;
  fvec y = p * z * (z * z) - n * 2.12194440e-4f - 0.5f * (z * z);
  return x == x ? z + y + n * 0.693359375f : x;
}
// 1 / d to about 1 ulp for d in [1, 1e4]: AVX-512's division takes three times as long as an estimate and a Newton
// step.
PF_INLINE fvec reciprocal(fvec d) {
#ifdef __AVX512F__
  fvec r = (fvec)_mm512_rcp14_ps((__m512)d);
  return r + r * (1.f - d * r);
#else
  return 1.f / d;
#endif
}
PF_INLINE fvec sigmoid(fvec x) { return 1.f / (1.f + exp(-x)); }

PF_INLINE fvec abs(fvec x) { return (fvec)((ivec)x & 0x7fffffff); }
PF_INLINE fvec copysign(fvec magnitude, fvec sign) {
  return (fvec)(((ivec)magnitude & 0x7fffffff) | ((ivec)sign & int32_t(0x80000000)));
}

// tanh to about 1 ulp: an odd polynomial (own minimax fit, relative error 4e-9) below 0.62, 1 - 2 / (exp(2|x|) + 1)
// above.
PF_INLINE fvec tanh(fvec x) {
  fvec t = abs(x), s = x * x;
  fvec p = splat(-5.743008573e-3f);
  p = p * s + 2.067148499e-2f;
  p = p * s - 5.374911800e-2f;
  p = p * s + 1.333154887e-1f;
  p = p * s - 3.333328664e-1f;
  fvec small = x * s * p + x;
  return t < 0.62f ? small : copysign(1.f - 2.f / (exp(2.f * t) + 1.f), x);
}

}  // namespace
}  // namespace pyfast::PYFAST_ISA
