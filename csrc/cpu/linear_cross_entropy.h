#pragma once
#include <cstdint>

#include "cpu/cross_entropy.h"

namespace pyfast::avx512 {

// Loss, logsumexp and the gradient of x for a frozen bf16 head, in one sweep over its weight. Only
// where current_isa() is Isa::amx. x (., features) and dx: contiguous, the rows that count standing where r.index says;
// features a multiple of 32; weight (r.classes, features), its rows `stride` (even) elements apart. No label smoothing.
void frozen_linear_cross_entropy(const LossRows& r, const void* x, const void* weight, int64_t features, int64_t stride,
                                 void* dx);

}  // namespace pyfast::avx512
