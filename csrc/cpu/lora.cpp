// Register tiles of fp32 accumulators; 16-bit inputs are widened, and dropped out, into a small scratch tile once and
// then used for all r columns. Sums are cut into blocks, which bounds their rounding error.
#include "cpu/lora.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/philox.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int ACC = VL == 16 ? 16 : 8;  // accumulator vectors per tile: half of the registers

// out[c] = dropout(x)[c], c < n, as fp32; `index` numbers x[0]
template <class T>
PF_INLINE void widen(const T* x, int64_t n, const Dropout* dropout, uint64_t index, float* out) {
  if (dropout) {
    dropout->fill(index, n, out);
    for_lanes(
        n, [=](int64_t i, int lanes) { store_any(out + i, load_any(out + i, lanes) * load_any(x + i, lanes), lanes); });
  } else {
    for_lanes(n, [=](int64_t i, int lanes) { store_any(out + i, load_any(x + i, lanes), lanes); });
  }
}

// ---- h = x a
constexpr int64_t kDepth = 256;  // columns of x per block: a's block (16 KB at r = 16) and x's rows stay in L1

// total[m, v] += sum_c x[m, c] a[c, v], for MR rows of x (stride kDepth) and NV vectors of a
template <int NV>
PF_INLINE void down_tile(const float* x, const float* a, int64_t lda, int64_t depth, float* total, int64_t ld) {
  constexpr int MR = ACC / NV;
  fvec acc[MR][NV] = {};
  for (int64_t c = 0; c < depth; ++c) {
    fvec panel[NV];
    for (int v = 0; v < NV; ++v) panel[v] = load(a + c * lda + v * VL);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) acc[m][v] += x[m * kDepth + c] * panel[v];
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) store(total + m * ld + v * VL, load(total + m * ld + v * VL) + acc[m][v]);
}

// Rows first .. last - 1. A tile may read up to kSlack floats beyond a's rows; what comes of them is not stored.
template <int NV, class T>
void down(const T* x, int64_t first, int64_t last, int64_t k, const Dropout* dropout, const float* a, int64_t lda,
          int64_t r, float* h, int64_t ldh) {
  constexpr int MR = ACC / NV;
  const int64_t width = (r + NV * VL - 1) / (NV * VL) * (NV * VL);
  std::vector<float> scratch(MR * (kDepth + width));
  float *block = scratch.data(), *total = block + MR * kDepth;
  for (int64_t i = first; i < last; i += MR) {
    const int64_t count = std::min<int64_t>(MR, last - i);
    std::fill(total, total + MR * width, 0.f);
    if (count < MR) std::fill(block, block + MR * kDepth, 0.f);
    for (int64_t c = 0; c < k; c += kDepth) {
      const int64_t depth = std::min(kDepth, k - c);
      for (int64_t m = 0; m < count; ++m) {
        widen(x + (i + m) * k + c, depth, dropout, uint64_t((i + m) * k + c), block + m * kDepth);
      }
      for (int64_t j = 0; j < width; j += NV * VL) down_tile<NV>(block, a + c * lda + j, lda, depth, total + j, width);
    }
    for (int64_t m = 0; m < count; ++m) std::copy_n(total + m * width, r, h + (i + m) * ldh);
  }
}

// ---- y += h b + bias
constexpr int64_t kUpRows = 64, kUpColumns = 512;  // b's block (32 KB at r = 16) is used for all rows of a task

template <int MR, int NV, class T>
PF_INLINE void up_tile(T* y, int64_t n, int lanes, const Dropout* dropout, uint64_t index, const float* h, int64_t ldh,
                       int64_t r, const float* b, int64_t ldb, const float* bias) {
  fvec acc[MR][NV] = {};
  for (int64_t j = 0; j < r; ++j) {
    fvec panel[NV];
    for (int v = 0; v < NV; ++v) panel[v] = load(b + j * ldb + v * VL);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) acc[m][v] += h[m * ldh + j] * panel[v];
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) {
      fvec term = acc[m][v];
      if (dropout) {
        float factor[VL];
        dropout->fill(index + m * n + v * VL, lanes, factor);
        term *= load_any(factor, lanes);
      }
      if (bias) term += load(bias + v * VL);
      T* p = y + m * n + v * VL;
      store_any(p, load_any(p, lanes) + term, lanes);
    }
}

template <int MR, class T>
PF_INLINE void up_rows(T* y, int64_t row, int64_t n, int64_t begin, int64_t end, const Dropout* dropout, const float* h,
                       int64_t ldh, int64_t r, const float* b, const float* bias) {
  constexpr int NV = 4;
  const int64_t ldb = padded(n);
  int64_t c = begin;
  const auto tile = [&](auto vectors, int lanes) {
    up_tile<MR, vectors.value>(y + row * n + c, n, lanes, dropout, uint64_t(row * n + c), h + row * ldh, ldh, r, b + c,
                               ldb, bias ? bias + c : nullptr);
  };
  for (; c + NV * VL <= end; c += NV * VL) tile(std::integral_constant<int, NV>(), VL);
  for (; c < end; c += VL) tile(std::integral_constant<int, 1>(), int(std::min<int64_t>(VL, end - c)));
}

template <class T>
void up(T* y, int64_t rows, int64_t n, const Dropout* dropout, const float* h, int64_t ldh, int64_t r, const float* b,
        const float* bias) {
  constexpr int MR = ACC / 4;
  const int64_t across = (n + kUpColumns - 1) / kUpColumns, along = (rows + kUpRows - 1) / kUpRows;
  parallel_for(across * along, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % across * kUpColumns, end = std::min(n, begin + kUpColumns);
      int64_t i = task / across * kUpRows;
      const int64_t stop = std::min(rows, i + kUpRows);
      for (; i + MR <= stop; i += MR) up_rows<MR>(y, i, n, begin, end, dropout, h, ldh, r, b, bias);
      for (; i < stop; ++i) up_rows<1>(y, i, n, begin, end, dropout, h, ldh, r, b, bias);
    }
  });
}

// ---- g = h^T x
constexpr int64_t kOuterRows = 64;
constexpr int kOuterVectors = 2;
constexpr int64_t kOuterColumns = kOuterVectors * VL;

// g[j, c] += sum_i h[i, j] x[i, c] for JR rows of g; x is a scratch tile of kOuterColumns columns
template <int JR>
PF_INLINE void outer_tile(const float* x, int64_t rows, const float* h, int64_t ldh, float* g, int64_t ldg, int width) {
  fvec acc[JR][kOuterVectors] = {};
  for (int64_t i = 0; i < rows; ++i) {
    fvec tile[kOuterVectors];
    for (int v = 0; v < kOuterVectors; ++v) tile[v] = load(x + i * kOuterColumns + v * VL);
#pragma GCC unroll 16
    for (int j = 0; j < JR; ++j)
      for (int v = 0; v < kOuterVectors; ++v) acc[j][v] += h[i * ldh + j] * tile[v];
  }
  for (int j = 0; j < JR; ++j)
    for (int v = 0; v < kOuterVectors; ++v) {
      const int lanes = std::clamp(width - v * VL, 0, VL);
      float* p = g + j * ldg + v * VL;
      if (lanes) store_any(p, load_any(p, lanes) + acc[j][v], lanes);
    }
}

template <class T>
void outer(const T* x, int64_t rows, int64_t m, const Dropout* dropout, const float* h, int64_t ldh, int64_t r,
           float* g, float* column_sum) {
  constexpr int JR = ACC / kOuterVectors;
  const int64_t ldg = padded(m);
  // about 16 tasks, whatever the number of threads, so that results do not depend on it
  const int64_t strip =
      std::clamp((m / 16 + kOuterColumns - 1) / kOuterColumns, int64_t(1), 512 / kOuterColumns) * kOuterColumns;
  parallel_for((m + strip - 1) / strip, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * strip, end = std::min(m, last * strip);
    for (int64_t j = 0; j < r; ++j) std::fill(g + j * ldg + begin, g + j * ldg + end, 0.f);
    if (column_sum) std::fill(column_sum + begin, column_sum + end, 0.f);
    alignas(64) float block[kOuterRows * kOuterColumns] = {};
    for (int64_t i = 0; i < rows; i += kOuterRows) {
      const int64_t count = std::min(kOuterRows, rows - i);
      for (int64_t c = begin; c < end; c += kOuterColumns) {
        const int width = int(std::min(kOuterColumns, end - c));
        for (int64_t row = 0; row < count; ++row) {
          const int64_t e = (i + row) * m + c;
          widen(x + e, width, dropout, uint64_t(e), block + row * kOuterColumns);
        }
        int64_t j = 0;
        for (; j + JR <= r; j += JR) outer_tile<JR>(block, count, h + i * ldh + j, ldh, g + j * ldg + c, ldg, width);
        for (; j < r; ++j) outer_tile<1>(block, count, h + i * ldh + j, ldh, g + j * ldg + c, ldg, width);
        if (column_sum) {
          const float one = 1.f;
          outer_tile<1>(block, count, &one, 0, column_sum + c, ldg, width);
        }
      }
    }
  });
}

constexpr int64_t kGrain = 4096;  // elements of a panel per task

}  // namespace

void lora_pack(Matrix source, float scale, float* panel, int64_t ld) {
  PYFAST_DISPATCH(source.dtype, T, {
    parallel_for(source.rows, kGrain / std::max<int64_t>(1, source.columns), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const T* row = (const T*)source.data + i * source.row_stride;
        for (int64_t j = 0; j < source.columns; ++j)
          panel[i * ld + j] = scale * to_float(row[j * source.column_stride]);
      }
    });
  })
}

void lora_unpack(const float* panel, int64_t ld, float scale, Matrix target) {
  PYFAST_DISPATCH(target.dtype, T, {
    parallel_for(target.rows, kGrain / std::max<int64_t>(1, target.columns), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        T* row = (T*)target.data + i * target.row_stride;
        for (int64_t j = 0; j < target.columns; ++j) {
          row[j * target.column_stride] = from_float<T>(scale * panel[i * ld + j]);
        }
      }
    });
  })
}

void lora_down(DType t, const void* x, int64_t rows, int64_t k, DropoutArgs args, const float* a, int64_t lda,
               int64_t r, float* h, int64_t ldh) {
  const Dropout mask(args.p, args.seed), *dropout = args.p > 0 ? &mask : nullptr;
  PYFAST_DISPATCH(t, T, {
    parallel_for(rows, ACC, [&](int64_t first, int64_t last) {
      const auto product = r <= VL ? down<1, T> : r <= 2 * VL ? down<2, T> : down<4, T>;
      product((const T*)x, first, last, k, dropout, a, lda, r, h, ldh);
    });
  })
}

void lora_up(DType t, void* y, int64_t rows, int64_t n, DropoutArgs args, const float* h, int64_t ldh, int64_t r,
             const float* b, const float* bias) {
  const Dropout mask(args.p, args.seed), *dropout = args.p > 0 ? &mask : nullptr;
  PYFAST_DISPATCH(t, T, up((T*)y, rows, n, dropout, h, ldh, r, b, bias))
}

void lora_outer(DType t, const void* x, int64_t rows, int64_t m, DropoutArgs args, const float* h, int64_t ldh,
                int64_t r, float* g, float* column_sum) {
  const Dropout mask(args.p, args.seed), *dropout = args.p > 0 ? &mask : nullptr;
  PYFAST_DISPATCH(t, T, outer((const T*)x, rows, m, dropout, h, ldh, r, g, column_sum))
}

}  // namespace pyfast::PYFAST_ISA
