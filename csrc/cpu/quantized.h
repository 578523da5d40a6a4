#pragma once
#include <cstdint>

#include "common/types.h"
#include "cpu/isa.h"

namespace pyfast {

// out[i, j] = levels[code of (i, j)] * scale[i / block_rows, j / block_columns], for a row-major (n, k) matrix whose
// codes are bytes, or half bytes (the first of two high) where there are 16 levels instead of 256.
PYFAST_KERNEL(void, dequantize,
              (const uint8_t* codes, const float* levels, int count, const float* scale, int64_t n, int64_t k,
               int64_t block_rows, int64_t block_columns, DType t, void* out),
              (codes, levels, count, scale, n, k, block_rows, block_columns, t, out))

}  // namespace pyfast
