#pragma once
#include <cstdint>

#include "common/types.h"
#include "cpu/isa.h"

namespace pyfast {
PYFAST_KERNEL(void, swiglu, (DType t, const void* gate, const void* up, void* y, int64_t n), (t, gate, up, y, n))
PYFAST_KERNEL(void, swiglu_backward,
              (DType t, const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t n),
              (t, dy, gate, up, dgate, dup, n))
}  // namespace pyfast
