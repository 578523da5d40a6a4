// A table lookup and one product per element, rounded once; written so that the loops stay simple: the matrix product
// that follows costs far more.
#include "cpu/quantized.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

template <class T>
void expand(const uint8_t* codes, const float* levels, int count, const float* scale, int64_t n, int64_t k,
            int64_t block_rows, int64_t block_columns, T* out) {
  const int64_t across = (k + block_columns - 1) / block_columns;
  parallel_for(n * across, 16384 / std::min(block_columns, k) + 1, [=](int64_t first, int64_t last) {
    for (int64_t segment = first; segment < last; ++segment) {
      const int64_t row = segment / across, block = segment % across;
      const int64_t begin = row * k + block * block_columns, end = std::min(row * k + k, begin + block_columns);
      const float factor = scale[row / block_rows * across + block];
      if (count == 16) {
        T scaled[16];
        for (int level = 0; level < 16; ++level) scaled[level] = from_float<T>(levels[level] * factor);
        for (int64_t e = begin; e < end; e += 2) {
          const uint8_t pair = codes[e / 2];
          out[e] = scaled[pair >> 4];
          out[e + 1] = scaled[pair & 15];
        }
      } else {
        for (int64_t e = begin; e < end; ++e) out[e] = from_float<T>(levels[codes[e]] * factor);
      }
    }
  });
}

}  // namespace

void dequantize(const uint8_t* codes, const float* levels, int count, const float* scale, int64_t n, int64_t k,
                int64_t block_rows, int64_t block_columns, DType t, void* out) {
  PYFAST_DISPATCH(t, T, expand(codes, levels, count, scale, n, k, block_rows, block_columns, (T*)out))
}

}  // namespace pyfast::PYFAST_ISA
