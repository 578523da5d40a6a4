// One pass, the factors made on the way and never stored.
#include "cpu/dropout.h"

#include <algorithm>

#include "common/philox.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kChunk = 1024;

template <class T>
void drop(const T* x, T* y, int64_t n, const Dropout& dropout) {
  parallel_for((n + kChunk - 1) / kChunk, 4, [=](int64_t first, int64_t last) {
    float factor[kChunk];
    for (int64_t begin = first * kChunk; begin < std::min(n, last * kChunk); begin += kChunk) {
      int64_t count = std::min(kChunk, n - begin);
      dropout.fill(begin, count, factor);
      for_lanes(count, [&](int64_t i, int lanes) {
        // a dropped element is 0, whatever it was
        fvec f = load_any(factor + i, lanes);
        store_any(y + begin + i, f == 0.f ? fvec{} : load_any(x + begin + i, lanes) * f, lanes);
      });
    }
  });
}

}  // namespace

void dropout(DType t, const void* x, void* y, int64_t n, double p, uint64_t seed) {
  PYFAST_DISPATCH(t, T, drop((const T*)x, (T*)y, n, Dropout(p, seed)))
}

}  // namespace pyfast::PYFAST_ISA
