#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace pyfast {
PYFAST_KERNEL(void, dropout_factors, (double p, uint64_t seed, uint64_t begin, int64_t count, float* factors),
              (p, seed, begin, count, factors))
}  // namespace pyfast
