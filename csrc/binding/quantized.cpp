#include "cpu/quantized.h"

#include "binding/quantized.h"

namespace pyfast {
namespace {

Tensor dequantize_cpu(const Tensor& codes, const Tensor& scale, std::vector<double> levels, int64_t n, int64_t k,
                      int64_t block_rows, int64_t block_columns, ScalarType dtype) {
  check_codes(codes, scale, levels.size(), n, k, block_rows, block_columns);
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
