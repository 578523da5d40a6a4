// Rotary position embedding of (batch, heads, seq, dim).
#pragma once
#include <cstdint>

#include "common/types.h"
#include "cpu/isa.h"

namespace pyfast {

struct RopeShape {
  int64_t batch, heads, seq, dim, width;  // the first `width` of dim elements turn, the others are copied
  int64_t x_strides[3], y_strides[3];     // of batch, heads and seq, in elements; elements of dim lie side by side
  int64_t cos_batch_stride;               // seq * width, or 0 where all sequences share their angles
  bool interleaved;                       // pairs (2j, 2j + 1), else (j, j + width / 2)
  bool inverse;                           // the transpose: backward
};

// cos, sin: contiguous (batch or 1, seq, width) of type `angle`
PYFAST_KERNEL(void, rope,
              (DType t, DType angle, RopeShape shape, const void* x, const void* cos, const void* sin, void* y),
              (t, angle, shape, x, cos, sin, y))

}  // namespace pyfast
