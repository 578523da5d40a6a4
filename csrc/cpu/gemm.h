// Products of small blocks that lie in cache, for kernels that fuse more around them: C (fp32) = or += A B.
//
//   block_gemm(M, N, K, A, lda, B, ldb, C, ldc, accumulate)
//
// float: A (M, K) and B (K, N) row-major, N a multiple of 16; FMA micro-kernels of 6 x 64 (AVX-512) or 6 x 16 (AVX2),
//        or of fewer columns and more rows. `multiply` also takes A transposed, and results of any type and width.
// bf16:  A (M, K) row-major, B (K, N) with its rows interleaved by pairs, B[k / 2][n][k % 2] (ldb counts columns), as
//        AMX wants it ("VNNI"); M, N and K multiples of 32, so pad with zeros. Only where current_isa() is amx, with a
//        Tiles (cpu/amx.h) alive in the calling thread.
//
// Written rather than taken from libtorch's brgemm: that is a private C++ symbol, its 16-bit form needs AMX or falls
// back to a slow GEMM, and it compiles one kernel per shape and stride. In cache this one is as fast
// (benchmarks/NOTES.md). Also here: the layouts that such products want.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/amx.h"
#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

// ---- fp32

// Where a product goes: `columns` columns of a row-major C of any element type, added to what is there, or each row
// times its factor.
template <class T>
struct Destination {
  T* data;
  int64_t ld, columns;
  bool accumulate = false;
  const float* row_factor = nullptr;
};

// With kAhead, 16 bytes of `ahead` are fetched into L2 for each of K.
template <int MR, int NV, bool kTransposed, bool kAhead = false, class T>
inline void fma_tile(int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, const Destination<T>& C,
                     int64_t row, int64_t column, const float* ahead = nullptr) {
  fvec c[MR][NV];
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NV; ++n) c[m][n] = fvec{};
  const auto step = [&](int64_t k) {
    fvec b[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) b[n] = load(B + k * ldb + n * VL);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      fvec a = splat(kTransposed ? A[k * lda + m] : A[m * lda + k]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) c[m][n] += a * b[n];
    }
  };
  int64_t k = 0;
  for (; kAhead && k + 4 <= K; k += 4, ahead += 16) {
    _mm_prefetch((const char*)ahead, _MM_HINT_T1);
#pragma GCC unroll 4
    for (int64_t i = k; i < k + 4; ++i) step(i);
  }
  for (; k < K; ++k) step(k);
  auto write = [&](auto lanes_of) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const float factor = C.row_factor ? C.row_factor[row + m] : 1.f;
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        T* y = C.data + (row + m) * C.ld + column + n * VL;
        const int lanes = lanes_of(n);
        // added last: the rounding errors of this block stay relative to its own sum
        if (C.accumulate) c[m][n] += load_any(y, lanes);
        store_any(y, c[m][n] * factor, lanes);
      }
    }
  };
  if (column + NV * VL <= C.columns)
    write([](int) { return VL; });
  else
    write([&](int n) { return int(std::clamp<int64_t>(C.columns - column - n * VL, 0, VL)); });
}

template <int MR, int NV, bool kTransposed, class T>
inline void fma_columns(int64_t M, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb,
                        const Destination<T>& C, int64_t column) {
  const int64_t step = kTransposed ? 1 : lda;
  int64_t m = 0;
  for (; m + MR <= M; m += MR) fma_tile<MR, NV, kTransposed>(K, A + m * step, lda, B, ldb, C, m, column);
  for (; m + 4 <= M; m += 4) fma_tile<4, NV, kTransposed>(K, A + m * step, lda, B, ldb, C, m, column);
  for (; m + 2 <= M; m += 2) fma_tile<2, NV, kTransposed>(K, A + m * step, lda, B, ldb, C, m, column);
  if (m < M) fma_tile<1, NV, kTransposed>(K, A + m * step, lda, B, ldb, C, m, column);
}

// C = A B, or with kTransposed Aᵀ B, A then being (K, M). N is C's columns rounded up to whole vectors: B has so many.
template <bool kTransposed, class T>
inline void multiply(int64_t M, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb,
                     const Destination<T>& C) {
  constexpr int kWide = VL == 16 ? 4 : 2;
  int64_t n = 0;
  for (; C.columns - n > (kWide - 1) * VL; n += kWide * VL)
    fma_columns<6, kWide, kTransposed>(M, K, A, lda, B + n, ldb, C, n);
  const int64_t rest = C.columns - n;
  if (kWide == 4 && rest > 2 * VL)
    fma_columns<8, 3, kTransposed>(M, K, A, lda, B + n, ldb, C, n);
  else if (kWide == 4 && rest > VL)
    fma_columns<12, 2, kTransposed>(M, K, A, lda, B + n, ldb, C, n);
  else if (rest > 0)
    fma_columns<12, 1, kTransposed>(M, K, A, lda, B + n, ldb, C, n);
}

inline void block_gemm(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb,
                       float* C, int64_t ldc, bool accumulate) {
  multiply<false>(M, K, A, lda, B, ldb, Destination<float>{C, ldc, N, accumulate});
}

// ---- bf16 on AMX

#ifdef __AVX512F__

inline void block_gemm(int64_t M, int64_t N, int64_t K, const bf16* A, int64_t lda, const bf16* B, int64_t ldb,
                       float* C, int64_t ldc, bool accumulate) {
  for (int64_t n = 0; n < N; n += 2 * kTile)
    for (int64_t m = 0; m < M; m += 2 * kTile) {
      const bf16 *a = A + m * lda, *b = B + 2 * n;
      float* c = C + m * ldc + n;
      multiply_tiles(K / kTileDepth, {a, a + kTile * lda, kTileDepth, 2 * lda},
                     {b, b + 2 * kTile, kTileDepth * ldb, 4 * ldb},
                     {c, c + kTile, c + kTile * ldc, c + kTile * ldc + kTile, 4 * ldc}, accumulate);
    }
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

// y[c][r] = x[r][c] of 32-bit elements; columns a multiple of 16 (AVX2: of 8), rows rounded up to one, with zeros
inline void transpose32(const void* x, int64_t ldx, void* y, int64_t ldy, int64_t rows, int64_t columns) {
  auto in = static_cast<const uint32_t*>(x);
  auto out = static_cast<uint32_t*>(y);
  for (int64_t i = 0; i < rows; i += VL)
    for (int64_t j = 0; j < columns; j += VL) {
      uvec r[VL];
#pragma GCC unroll 16
      for (int n = 0; n < VL; ++n) {
        r[n] = uvec{};
        if (i + n < rows) std::memcpy(&r[n], in + (i + n) * ldx + j, sizeof r[n]);
      }
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
