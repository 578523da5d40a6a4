// Products of small blocks that lie in cache, for kernels that fuse more around them: C (fp32) = or += A B.
//
//   block_gemm(M, N, K, A, lda, B, ldb, C, ldc, accumulate)
//
// float: A (M, K) and B (K, N) row-major, N a multiple of 16; an FMA micro-kernel of 6 x 64 (AVX-512) or 6 x 16 (AVX2).
// bf16:  A (M, K) row-major, B (K, N) with its rows interleaved by pairs, B[k / 2][n][k % 2] (ldb counts columns), as
//        AMX wants it ("VNNI"); M and N multiples of 16, K of 32, so pad with zeros. Only where current_isa() is amx,
//        with an AmxTiles alive in the calling thread.
//
// Written rather than taken from libtorch's brgemm: that is a private C++ symbol, its 16-bit form needs AMX or falls
// back to a slow GEMM, and it compiles one kernel per shape and stride. In cache this one is as fast
// (benchmarks/NOTES.md). Also here: the layouts that such products want.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

// ---- fp32

template <int MR, int NV>
PF_INLINE void fma_tile(int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc,
                        bool accumulate) {
  fvec c[MR][NV];
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NV; ++n) c[m][n] = fvec{};
  for (int64_t k = 0; k < K; ++k) {
    fvec b[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) b[n] = load(B + k * ldb + n * VL);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      fvec a = splat(A[m * lda + k]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) c[m][n] += a * b[n];
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NV; ++n) {
      // added last: the rounding errors of this block stay relative to its own sum
      if (accumulate) c[m][n] += load(C + m * ldc + n * VL);
      store(C + m * ldc + n * VL, c[m][n]);
    }
}

template <int NV>
inline void fma_columns(int64_t M, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C,
                        int64_t ldc, bool accumulate) {
  int64_t m = 0;
  for (; m + 6 <= M; m += 6) fma_tile<6, NV>(K, A + m * lda, lda, B, ldb, C + m * ldc, ldc, accumulate);
  if (m + 4 <= M) fma_tile<4, NV>(K, A + m * lda, lda, B, ldb, C + m * ldc, ldc, accumulate), m += 4;
  if (m + 2 <= M) fma_tile<2, NV>(K, A + m * lda, lda, B, ldb, C + m * ldc, ldc, accumulate), m += 2;
  if (m < M) fma_tile<1, NV>(K, A + m * lda, lda, B, ldb, C + m * ldc, ldc, accumulate);
}

inline void block_gemm(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb,
                       float* C, int64_t ldc, bool accumulate) {
  constexpr int kWide = VL == 16 ? 4 : 2;
  int64_t n = 0;
  for (; n + kWide * VL <= N; n += kWide * VL) fma_columns<kWide>(M, K, A, lda, B + n, ldb, C + n, ldc, accumulate);
  if (kWide == 4 && n + 2 * VL <= N) fma_columns<2>(M, K, A, lda, B + n, ldb, C + n, ldc, accumulate), n += 2 * VL;
  if (n < N) fma_columns<1>(M, K, A, lda, B + n, ldb, C + n, ldc, accumulate);
}

// ---- bf16 on AMX

#ifdef __AVX512F__

// Configures this thread's eight tiles as 16 rows of 64 bytes, and gives them back.
struct AmxTiles {
  AmxTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~AmxTiles() { __asm__ volatile("tilerelease"); }
};

#define PF_TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t::)
#define PF_TILE_LOAD(t, p, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"(p), "r"(int64_t(stride)) : "memory")
#define PF_TILE_STORE(t, p, stride) \
  __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"(int64_t(stride)) : "memory")
#define PF_TILE_DOT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)

// C of two tiles by two (or one): tiles 0 to 3; A in 4 and 5, B in 6 and 7
template <bool kTwoRows, bool kTwoColumns>
PF_INLINE void amx_tile(int64_t K, const bf16* A, int64_t lda, const bf16* B, int64_t ldb, float* C, int64_t ldc,
                        bool accumulate) {
  if (accumulate) {
    PF_TILE_LOAD(0, C, ldc * 4);
    if (kTwoColumns) PF_TILE_LOAD(1, C + 16, ldc * 4);
    if (kTwoRows) PF_TILE_LOAD(2, C + 16 * ldc, ldc * 4);
    if (kTwoRows && kTwoColumns) PF_TILE_LOAD(3, C + 16 * ldc + 16, ldc * 4);
  } else {
    PF_TILE_ZERO(0);
    PF_TILE_ZERO(1);
    PF_TILE_ZERO(2);
    PF_TILE_ZERO(3);
  }
  for (int64_t k = 0; k < K; k += 32) {
    const bf16* b = B + k * ldb;
    PF_TILE_LOAD(4, A + k, lda * 2);
    PF_TILE_LOAD(6, b, ldb * 4);
    if (kTwoColumns) PF_TILE_LOAD(7, b + 32, ldb * 4);
    PF_TILE_DOT(0, 4, 6);
    if (kTwoColumns) PF_TILE_DOT(1, 4, 7);
    if (kTwoRows) {
      PF_TILE_LOAD(5, A + 16 * lda + k, lda * 2);
      PF_TILE_DOT(2, 5, 6);
      if (kTwoColumns) PF_TILE_DOT(3, 5, 7);
    }
  }
  PF_TILE_STORE(0, C, ldc * 4);
  if (kTwoColumns) PF_TILE_STORE(1, C + 16, ldc * 4);
  if (kTwoRows) PF_TILE_STORE(2, C + 16 * ldc, ldc * 4);
  if (kTwoRows && kTwoColumns) PF_TILE_STORE(3, C + 16 * ldc + 16, ldc * 4);
}

inline void block_gemm(int64_t M, int64_t N, int64_t K, const bf16* A, int64_t lda, const bf16* B, int64_t ldb,
                       float* C, int64_t ldc, bool accumulate) {
  for (int64_t n = 0; n < N; n += 32) {
    bool two_columns = n + 32 <= N;
    for (int64_t m = 0; m < M; m += 32) {
      bool two_rows = m + 32 <= M;
      auto tile = two_rows ? (two_columns ? amx_tile<true, true> : amx_tile<true, false>)
                           : (two_columns ? amx_tile<false, true> : amx_tile<false, false>);
      tile(K, A + m * lda, lda, B + 2 * n, ldb, C + m * ldc + n, ldc, accumulate);
    }
  }
}

// 16 lanes each of two fp32 vectors, rounded to nearest even: low's in the lower half (AVX512-BF16, which every CPU
// with AMX-BF16 has; subnormals become zero)
PF_INLINE __m512i round_bf16(fvec low, fvec high) {
  __m512i packed;
  __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(packed) : "v"(high), "v"(low));
  return packed;
}
// (low 0, high 0, low 1, high 1, ...) of such a vector: two rows become a row of pairs
PF_INLINE __m512i interleave(__m512i packed) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, packed);
}
#endif

// ---- layouts

template <int kStep>
PF_INLINE void transpose_step(uvec* r) {
  uvec low, high;  // lanes of (a, b): an index of VL or more takes from b
  for (int i = 0; i < VL; ++i) {
    low[i] = i & kStep ? VL + i - kStep : i;
    high[i] = i & kStep ? VL + i : i + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) {
    if (i & kStep) continue;
    uvec a = r[i], b = r[i + kStep];
    r[i] = __builtin_shuffle(a, b, low);
    r[i + kStep] = __builtin_shuffle(a, b, high);
  }
}

// y[c][r] = x[r][c] of 32-bit elements; rows and columns multiples of 16
inline void transpose32(const void* x, int64_t ldx, void* y, int64_t ldy, int64_t rows, int64_t columns) {
  auto in = static_cast<const uint32_t*>(x);
  auto out = static_cast<uint32_t*>(y);
  for (int64_t i = 0; i < rows; i += VL)
    for (int64_t j = 0; j < columns; j += VL) {
      uvec r[VL];
#pragma GCC unroll 16
      for (int n = 0; n < VL; ++n) std::memcpy(&r[n], in + (i + n) * ldx + j, sizeof r[n]);
      transpose_step<1>(r);
      transpose_step<2>(r);
      transpose_step<4>(r);
      if (VL == 16) transpose_step<VL / 2>(r);
#pragma GCC unroll 16
      for (int n = 0; n < VL; ++n) std::memcpy(out + (j + n) * ldy + i, &r[n], sizeof r[n]);
    }
}

// The layouts of a contiguous row-major block X (rows, columns), both multiples of 32, as operands of block_gemm.

// B operand of X (K = rows); for float that is X itself
inline void pack_pairs(const bf16* x, bf16* y, int64_t rows, int64_t columns) {
  for (int64_t k = 0; k < rows; k += 2, x += 2 * columns, y += 2 * columns)
    for (int64_t n = 0; n < columns; ++n) {
      y[2 * n] = x[n];
      y[2 * n + 1] = x[columns + n];
    }
}
// B operand of Xᵀ (K = columns); its leading dimension is `rows`
inline void pack_transposed(const bf16* x, bf16* y, int64_t rows, int64_t columns) {
  transpose32(x, columns / 2, y, rows, rows, columns / 2);
}
inline void pack_transposed(const float* x, float* y, int64_t rows, int64_t columns) {
  transpose32(x, columns, y, rows, rows, columns);
}
// A operand of Xᵀ: (columns, rows) row-major, leading dimension ldy; `scratch` has room for X
inline void pack_left_transposed(const bf16* x, bf16* scratch, bf16* y, int64_t ldy, int64_t rows, int64_t columns) {
  pack_pairs(x, scratch, rows, columns);
  transpose32(scratch, columns, y, ldy / 2, rows / 2, columns);
}
inline void pack_left_transposed(const float* x, float*, float* y, int64_t ldy, int64_t rows, int64_t columns) {
  transpose32(x, columns, y, ldy, rows, columns);
}

// Cache-line aligned scratch memory, uninitialised.
template <class T>
struct Scratch {
  explicit Scratch(int64_t count)
      : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)), &std::free) {
    if (!data) throw std::bad_alloc();
  }
  operator T*() const { return data.get(); }
  std::unique_ptr<T, decltype(&std::free)> data;
};

}  // namespace
}  // namespace pyfast::PYFAST_ISA
