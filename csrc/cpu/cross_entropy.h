#pragma once
#include <cstdint>

#include "common/types.h"
#include "cpu/isa.h"

namespace pyfast {

// The rows of a loss and its options. A logit is softcap · tanh(input · scale / softcap).
struct LossRows {
  int64_t rows, classes;
  const int64_t* index;    // where each row stands in target, upstream, loss and lse
  bool gathered;           // the input holds these rows only, in this order; otherwise they stand where index says
  const int64_t* target;   // checked: 0 <= target < classes
  const double* upstream;  // (., 2): the result's gradient with respect to loss and squared lse; null: no gradient
  const float* weight;     // (classes,), or null for ones
  double label_smoothing;
  float softcap;  // 0 for none
  float scale;
  double* loss;
  double* lse;
};

// Writes loss and logsumexp of each row, and with upstream the gradient of input, which may be input itself.
PYFAST_KERNEL(void, cross_entropy,
              (DType t, const LossRows& r, const void* input, int64_t stride, void* dinput, int64_t dstride),
              (t, r, input, stride, dinput, dstride))

// sums[j] += sum over rows of x[i][j], x (rows, cols) contiguous
PYFAST_KERNEL(void, add_column_sums, (DType t, const void* x, int64_t rows, int64_t cols, float* sums),
              (t, x, rows, cols, sums))

// sums[i] += scale · x[i]
PYFAST_KERNEL(void, add_scaled, (DType t, const void* x, float scale, float* sums, int64_t n), (t, x, scale, sums, n))

// Rows of `bytes` bytes: to[i] = from[index[i]], and to[index[i]] = from[i]
PYFAST_KERNEL(void, gather_rows, (const void* from, const int64_t* index, int64_t rows, int64_t bytes, void* to),
              (from, index, rows, bytes, to))
PYFAST_KERNEL(void, scatter_rows, (const void* from, const int64_t* index, int64_t rows, int64_t bytes, void* to),
              (from, index, rows, bytes, to))

}  // namespace pyfast
