// Products with weights and what LoRA adds to them.
#pragma once
#include <cstdint>

#include "common/types.h"
#include "cpu/isa.h"

namespace pyfast {

// x w of a sum of products: x is (rows, depth) contiguous, w (depth, columns) with rows of ldw elements, or,
// transposed, (columns, depth).
struct LinearTerm {
  const void *x, *w;
  int64_t depth, ldw;
  bool transposed;
};

// Whether `linear` takes a product: fp32, and bf16 on AMX (depth a multiple of 32, ldw even), with rows enough to make
// up for packing the weight.
inline bool serves_linear(DType t, int64_t rows, int64_t depth, int64_t ldw) {
  if (t == DType::fp32) return rows >= 256 && depth > 0;
  return t == DType::bf16 && current_isa() == Isa::amx && rows >= 16 && depth > 0 && depth % 32 == 0 && ldw % 2 == 0;
}

// y[i, c] = (y[i, c] if accumulate) + sum of the terms + sum_j h[i, j] b[j, c] + bias[c], rounded once; of a type and
// terms that serves_linear takes. y: (rows, columns) contiguous; h: rows of ldh floats; b: (r, padded(columns)) and
// bias: padded(columns), fp32 (cpu/lora.h); bias may be null, r zero. In bf16 h and b are rounded to bf16.
PYFAST_KERNEL(void, linear,
              (DType t, const LinearTerm* terms, int64_t count, int64_t rows, int64_t columns, const float* h,
               int64_t ldh, int64_t r, const float* b, const float* bias, bool accumulate, void* y),
              (t, terms, count, rows, columns, h, ldh, r, b, bias, accumulate, y))

}  // namespace pyfast
