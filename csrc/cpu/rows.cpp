#include "cpu/rows.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

template <class T>
void sum(const float* partial, int64_t blocks, int64_t cols, T* out) {
  parallel_for(cols, 16384 / (blocks + 1), [=](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += VL) {
      double s[VL] = {};
      int64_t n = end - j < VL ? end - j : VL;
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t i = 0; i < n; ++i) s[i] += partial[b * cols + j + i];
      for (int64_t i = 0; i < n; ++i) out[j + i] = from_float<T>(float(s[i]));
    }
  });
}

}  // namespace

void sum_blocks(const float* partial, int64_t blocks, int64_t cols, DType t, void* out) {
  PYFAST_DISPATCH(t, T, sum(partial, blocks, cols, (T*)out))
}
void widen(DType t, const void* in, float offset, float* out, int64_t n) {
  PYFAST_DISPATCH(t, T, for_lanes(n, [=](int64_t i, int lanes) {
                    store_any(out + i, load_any((const T*)in + i, lanes) + offset, lanes);
                  }))
}

}  // namespace pyfast::PYFAST_ISA
