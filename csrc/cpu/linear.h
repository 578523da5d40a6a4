#pragma once
#include <cstdint>

#include "common/types.h"

namespace pyfast::avx512 {

// x w of a sum of products: x is (rows, depth) contiguous, w (depth, columns) with rows of ldw elements, or,
// transposed, (columns, depth). bf16; depth a multiple of 32, ldw even.
struct LinearTerm {
  const void *x, *w;
  int64_t depth, ldw;
  bool transposed;
};

// Whether the kernel below takes a product: bf16, and enough rows to make up for packing the weight.
bool serves_linear(DType t, int64_t rows, int64_t depth, int64_t ldw);

// y[i, c] = (y[i, c] if accumulate) + sum of the terms + sum_j h[i, j] b[j, c] + bias[c], rounded once. Only where
// current_isa() is Isa::amx. y: (rows, columns) contiguous bf16; h: rows of ldh floats; b: (r, padded(columns)) and
// bias: padded(columns), fp32 (cpu/lora.h); bias may be null, r zero. h and b are rounded to bf16.
void linear(const LinearTerm* terms, int64_t count, int64_t rows, int64_t columns, const float* h, int64_t ldh,
            int64_t r, const float* b, const float* bias, bool accumulate, void* y);

}  // namespace pyfast::avx512
