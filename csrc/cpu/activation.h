// Activations alone, with a bias before them, or gating a second tensor; over rows of any stride.
#pragma once
#include <cstdint>

#include "common/types.h"
#include "cpu/isa.h"

namespace pyfast {

enum class Activation : int { silu, gelu, gelu_tanh, relu };

PYFAST_KERNEL(void, gated, (DType t, Activation a, Rows gate, Rows up, MutableRows y, int64_t rows, int64_t cols),
              (t, a, gate, up, y, rows, cols))
PYFAST_KERNEL(void, gated_backward,
              (DType t, Activation a, Rows dy, Rows gate, Rows up, MutableRows dgate, MutableRows dup, int64_t rows,
               int64_t cols),
              (t, a, dy, gate, up, dgate, dup, rows, cols))

// bias: fp32 (cols,), or null. value: where activate's result goes once more, or null data. dbias: null, or (cols,) for
// the sum of dx over rows; then partial is scratch of row_blocks(rows) * cols floats.
PYFAST_KERNEL(void, activate,
              (DType t, Activation a, Rows x, const float* bias, MutableRows y, int64_t rows, int64_t cols),
              (t, a, x, bias, y, rows, cols))
PYFAST_KERNEL(void, activate_backward,
              (DType t, Activation a, Rows dy, Rows x, const float* bias, MutableRows dx, MutableRows value,
               float* partial, DType dbias_type, void* dbias, int64_t rows, int64_t cols),
              (t, a, dy, x, bias, dx, value, partial, dbias_type, dbias, rows, cols))

}  // namespace pyfast
