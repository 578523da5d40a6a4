// The plain C interface of the kernels for quantised weights: no torch, no CUDA header.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace pyfast::cuda {

// out[i, j] = levels[code of (i, j)] * scale[i / block_rows, j / block_columns], a row-major (n, k) matrix whose codes
// are bytes, or half bytes, the first of two high, where there are 16 levels instead of 256
struct Dequantize {
  const uint8_t* codes;
  const float* scale;
  float levels[256];
  int level_count;
  int64_t n, k, block_rows, block_columns;
  DType dtype;
  void* out;
};

// y = x weight^T + add, of at most kQuantizedRows rows of 16-bit elements. The weight is (n, columns) to the product,
// and what Dequantize describes, of as many elements, to its scales.
constexpr int64_t kQuantizedRows = 32;
struct QuantizedLinear {
  Dequantize weight;  // its dtype is x's; no out
  int64_t rows, n, columns;
  const void *x, *add;  // contiguous, (rows, columns) and (rows, n); add may be null
  void* y;              // (rows, n), contiguous
};

}  // namespace pyfast::cuda

extern "C" {
// 0, or a code for pyfast_cuda_error
int pyfast_cuda_dequantize(const pyfast::cuda::Dequantize* arguments, void* stream);
int pyfast_cuda_quantized_linear(const pyfast::cuda::QuantizedLinear* arguments, void* stream);
}
