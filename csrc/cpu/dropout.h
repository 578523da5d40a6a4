#pragma once
#include <cstdint>

#include "common/types.h"
#include "cpu/isa.h"

namespace pyfast {
// y = x times the dropout factor of its index, of n contiguous elements; backward is the same on dy
PYFAST_KERNEL(void, dropout, (DType t, const void* x, void* y, int64_t n, double p, uint64_t seed),
              (t, x, y, n, p, seed))
}  // namespace pyfast
