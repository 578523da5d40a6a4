// The dropout factors that kernels apply on the fly, written out for the checks and for plain PyTorch code.
#include "cpu/philox.h"

#include "common/philox.h"
#include "cpu/parallel.h"

namespace pyfast::PYFAST_ISA {

void dropout_factors(double p, uint64_t seed, uint64_t begin, int64_t count, float* factors) {
  Dropout dropout(p, seed);
  parallel_for(count, 16384,
               [&](int64_t first, int64_t last) { dropout.fill(begin + first, last - first, factors + first); });
}

}  // namespace pyfast::PYFAST_ISA
