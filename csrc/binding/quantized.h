// What every backend's dequantize asks of its arguments.
#pragma once
#include "binding/binding.h"

namespace pyfast {

inline void check_codes(const Tensor& codes, const Tensor& scale, size_t levels, int64_t n, int64_t k,
                        int64_t block_rows, int64_t block_columns) {
  const bool pairs = levels == 16;
  CHECK_CONTIGUOUS(codes);
  CHECK_CONTIGUOUS(scale);
  STD_TORCH_CHECK(pairs || levels == 256, "expected 16 or 256 levels, got ", levels);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && scale.scalar_type() == ScalarType::Float,
                  "codes must be uint8 and scale float32");
  STD_TORCH_CHECK(n >= 0 && k >= 0 && block_rows > 0 && block_columns > 0 && !(pairs && block_columns % 2),
                  "expected sizes that are not negative, and an even number of columns in a block of pairs");
  const int64_t down = (n + block_rows - 1) / block_rows, across = (k + block_columns - 1) / block_columns;
  STD_TORCH_CHECK(codes.numel() * (pairs ? 2 : 1) == n * k && scale.numel() == down * across && !(pairs && k % 2),
                  "codes ", shape_of(codes), " and scale ", shape_of(scale), " do not fit an (n, k) weight");
}

}  // namespace pyfast
