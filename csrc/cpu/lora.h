// The low-rank products of LoRA: one side of each is a tall activation in its own dtype, read once; the other is a thin
// fp32 panel that stays in cache. PyTorch's matrix product is slow on such shapes.
#pragma once
#include <cstdint>

#include "common/types.h"
#include "cpu/isa.h"

namespace pyfast {

constexpr int64_t kPad = 16;    // panels' rows are padded with zeros to a multiple of this, for whole vectors
constexpr int64_t kSlack = 64;  // floats that may be read beyond a panel's end
inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// A matrix of any strides in its own dtype.
struct Matrix {
  DType dtype;
  void* data;
  int64_t rows, columns, row_stride, column_stride;
};

// Dropout of a (rows, k) input's elements, numbered row-major; p = 0 drops nothing.
struct DropoutArgs {
  double p;
  uint64_t seed;
};

// panel[i, j] = scale * source[i, j], with rows of `ld` floats
PYFAST_KERNEL(void, lora_pack, (Matrix source, float scale, float* panel, int64_t ld), (source, scale, panel, ld))

// target[i, j] = scale * panel[i, j]; the target's rows or its columns are contiguous
PYFAST_KERNEL(void, lora_unpack, (const float* panel, int64_t ld, float scale, Matrix target),
              (panel, ld, scale, target))

// h[i, j] = sum_c dropout(x)[i, c] a[c, j] for j < r; x is (rows, k), a (k, r) with rows of lda floats, and kSlack more
PYFAST_KERNEL(void, lora_down,
              (DType t, const void* x, int64_t rows, int64_t k, DropoutArgs dropout, const float* a, int64_t lda,
               int64_t r, float* h, int64_t ldh),
              (t, x, rows, k, dropout, a, lda, r, h, ldh))

// y[i, c] = dropout_factor[i, c] sum_j h[i, j] b[j, c] + bias[c], or += with accumulate; y is (rows, n), b
// (r, padded(n)), bias padded(n) or null. Rounds once.
PYFAST_KERNEL(void, lora_up,
              (DType t, void* y, int64_t rows, int64_t n, DropoutArgs dropout, const float* h, int64_t ldh, int64_t r,
               const float* b, const float* bias, bool accumulate),
              (t, y, rows, n, dropout, h, ldh, r, b, bias, accumulate))

// g[j, c] = sum_i h[i, j] dropout(x)[i, c], and column_sum[c] = sum_i x[i, c] unless null; x is (rows, m), g
// (r, padded(m)), column_sum padded(m). Sums of
// columns are for x without dropout.
PYFAST_KERNEL(void, lora_outer,
              (DType t, const void* x, int64_t rows, int64_t m, DropoutArgs dropout, const float* h, int64_t ldh,
               int64_t r, float* g, float* column_sum),
              (t, x, rows, m, dropout, h, ldh, r, g, column_sum))

}  // namespace pyfast
