// The plain C interface of dequantisation: no torch, no CUDA header.
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

}  // namespace pyfast::cuda

extern "C" {
// 0, or a code for pyfast_cuda_error
int pyfast_cuda_dequantize(const pyfast::cuda::Dequantize* arguments, void* stream);
}
