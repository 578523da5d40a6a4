#include "cpu/rows.h"

#include <cstring>

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

template <class T>
void sum_in_blocks(const T* x, int64_t rows, int64_t cols, float* partial) {
  const int64_t block = block_rows(rows);
  parallel_for(row_blocks(rows), 16384 / (block * cols + 1), [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* total = partial + b * cols;
      std::memset(total, 0, cols * sizeof(float));
      for (int64_t row = b * block; row < rows && row < (b + 1) * block; ++row)
        for_lanes(cols, [=](int64_t i, int lanes) {
          store_any(total + i, load_any(total + i, lanes) + load_any(x + row * cols + i, lanes), lanes);
        });
    }
  });
}

}  // namespace

void sum_rows(DType t, const void* x, int64_t rows, int64_t cols, float* partial) {
  PYFAST_DISPATCH(t, T, sum_in_blocks((const T*)x, rows, cols, partial))
}
void sum_blocks(const float* partial, int64_t blocks, int64_t cols, DType t, void* out) {
  PYFAST_DISPATCH(t, T, sum(partial, blocks, cols, (T*)out))
}
void widen(DType t, const void* in, float offset, float* out, int64_t n) {
  PYFAST_DISPATCH(t, T, for_lanes(n, [=](int64_t i, int lanes) {
                    store_any(out + i, load_any((const T*)in + i, lanes) + offset, lanes);
                  }))
}

}  // namespace pyfast::PYFAST_ISA
