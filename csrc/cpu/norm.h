// RMSNorm and LayerNorm over rows, with the residual sum before them.
#pragma once
#include <cstdint>

#include "common/types.h"
#include "cpu/isa.h"

namespace pyfast {

struct NormShape {
  int64_t rows, cols;
  int64_t weight_lines, bias_lines;  // row r takes line r % lines: more than one for a weight per head
  bool center;                       // LayerNorm subtracts the mean, RMSNorm does not
};

// weight: fp32 (weight_lines, cols); bias: fp32 (bias_lines, cols), or null. residual.data: null, or added to x first,
// and then the rounded sum is written to `sum`, contiguous. y: contiguous. mean (where centred) and rstd: fp32 (rows,),
// kept for backward.
PYFAST_KERNEL(void, norm,
              (DType t, NormShape shape, Rows x, Rows residual, const float* weight, const float* bias, double eps,
               void* y, void* sum, float* mean, float* rstd),
              (t, shape, x, residual, weight, bias, eps, y, sum, mean, rstd))

// dsum.data: null, or the gradient that reaches the sum itself, added to dx. dweight, dbias: null where not wanted, or
// scratch of row_blocks(rows) * lines * cols floats, for sum_blocks.
PYFAST_KERNEL(void, norm_backward,
              (DType t, NormShape shape, Rows dy, Rows dsum, Rows x, const float* mean, const float* rstd,
               const float* weight, void* dx, float* dweight, float* dbias),
              (t, shape, dy, dsum, x, mean, rstd, weight, dx, dweight, dbias))

}  // namespace pyfast
