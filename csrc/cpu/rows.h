// Sums over rows, reproducible for any number of threads: rows are summed in blocks of a fixed size, each into its own
// line of a scratch buffer, and the lines are added in order.
#pragma once
#include <cstdint>

#include "common/types.h"
#include "cpu/isa.h"

namespace pyfast {

// At most 64 blocks while they hold 8 to 256 rows each: enough for many threads, few enough that the lines stay small.
static inline int64_t block_rows(int64_t rows) {
  int64_t n = (rows + 63) / 64;
  return n < 8 ? 8 : n > 256 ? 256 : n;
}
static inline int64_t row_blocks(int64_t rows) { return (rows + block_rows(rows) - 1) / block_rows(rows); }

// out[j] = sum over blocks of partial[block][j]
PYFAST_KERNEL(void, sum_blocks, (const float* partial, int64_t blocks, int64_t cols, DType t, void* out),
              (partial, blocks, cols, t, out))

// partial[block][j] = sum over the block's rows of x[row][j]; partial has row_blocks(rows) lines of cols
PYFAST_KERNEL(void, sum_rows, (DType t, const void* x, int64_t rows, int64_t cols, float* partial),
              (t, x, rows, cols, partial))

// out[i] = float(in[i]) + offset
PYFAST_KERNEL(void, widen, (DType t, const void* in, float offset, float* out, int64_t n), (t, in, offset, out, n))

}  // namespace pyfast
