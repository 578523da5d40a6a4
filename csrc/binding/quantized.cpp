#include "cpu/quantized.h"

#include "binding/binding.h"

namespace pyfast {
namespace {

Tensor dequantize_cpu(const Tensor& codes, const Tensor& scale, std::vector<double> levels, int64_t n, int64_t k,
                      int64_t block_rows, int64_t block_columns, ScalarType dtype) {
  const bool pairs = levels.size() == 16;
  CHECK_CONTIGUOUS(codes);
  CHECK_CONTIGUOUS(scale);
  STD_TORCH_CHECK(pairs || levels.size() == 256, "expected 16 or 256 levels, got ", levels.size());
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && scale.scalar_type() == ScalarType::Float,
                  "codes must be uint8 and scale float32");
  STD_TORCH_CHECK(n >= 0 && k >= 0 && block_rows > 0 && block_columns > 0 && !(pairs && block_columns % 2),
                  "expected sizes that are not negative, and an even number of columns in a block of pairs");
  const int64_t down = (n + block_rows - 1) / block_rows, across = (k + block_columns - 1) / block_columns;
  STD_TORCH_CHECK(codes.numel() * (pairs ? 2 : 1) == n * k && scale.numel() == down * across && !(pairs && k % 2),
                  "codes ", shape_of(codes), " and scale ", shape_of(scale), " do not fit an (n, k) weight");
  Tensor out = make_empty(codes, {n, k}, dtype);
  const std::vector<float> table(levels.begin(), levels.end());
  if (out.numel() > 0) {
    dequantize(static_cast<const uint8_t*>(codes.const_data_ptr()), table.data(), int(table.size()),
               static_cast<const float*>(scale.const_data_ptr()), n, k, block_rows, block_columns, dtype_of(out),
               out.mutable_data_ptr());
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CPU, m) { m.impl("dequantize", TORCH_BOX(&dequantize_cpu)); }

}  // namespace pyfast
