#include "cuda/quantized.h"

#include "binding/cuda/device.h"
#include "binding/quantized.h"

namespace pyfast {
namespace {

cuda::Dequantize describe(const Tensor& codes, const Tensor& scale, const std::vector<double>& levels, int64_t n,
                          int64_t k, int64_t block_rows, int64_t block_columns, DType dtype) {
  check_codes(codes, scale, levels.size(), n, k, block_rows, block_columns);
  cuda::Dequantize a{};
  a.codes = static_cast<const uint8_t*>(codes.const_data_ptr()), a.scale = scale.const_data_ptr<float>();
  std::copy(levels.begin(), levels.end(), a.levels);
  a.level_count = int(levels.size()), a.n = n, a.k = k, a.block_rows = block_rows, a.block_columns = block_columns;
  a.dtype = dtype;
  return a;
}

Tensor dequantize(const Tensor& codes, const Tensor& scale, std::vector<double> levels, int64_t n, int64_t k,
                  int64_t block_rows, int64_t block_columns, ScalarType dtype) {
  Tensor out = make_empty(codes, {n, k}, dtype);
  cuda::Dequantize a = describe(codes, scale, levels, n, k, block_rows, block_columns, dtype_of(out));
  a.out = out.mutable_data_ptr();
  const OnDevice device(codes);
  check_launch(pyfast_cuda_dequantize(&a, device.stream()), "dequantize");
  return out;
}

Tensor quantized_linear(const Tensor& x, const std::optional<Tensor>& add, const Tensor& codes, const Tensor& scale,
                        std::vector<double> levels, int64_t n, int64_t k, int64_t block_rows, int64_t block_columns) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) <= cuda::kQuantizedRows && x.size(1) > 0 && n * k % x.size(1) == 0,
                  "x has shape ", shape_of(x), ", expected (rows, columns) of the weight, and at most ",
                  cuda::kQuantizedRows, " rows");
  CHECK_CONTIGUOUS(x);
  cuda::QuantizedLinear a{};
  a.weight = describe(codes, scale, levels, n, k, block_rows, block_columns, dtype_of(x));
  STD_TORCH_CHECK(a.weight.dtype != DType::fp32, "x must be bfloat16 or float16");
  a.rows = x.size(0), a.columns = x.size(1), a.n = n * k / a.columns;
  if (add) {
    CHECK_SHAPE(*add, a.rows, a.n);
    CHECK_CONTIGUOUS(add.value());
    CHECK_SAME_DTYPE(*add, x);
  }
  Tensor y = make_empty(x, {a.rows, a.n});
  a.x = x.const_data_ptr(), a.add = add ? add->const_data_ptr() : nullptr, a.y = y.mutable_data_ptr();
  const OnDevice device(x);
  check_launch(pyfast_cuda_quantized_linear(&a, device.stream()), "quantized_linear");
  return y;
}

}  // namespace

PYFAST_CUDA_IMPL(m) {
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
}

}  // namespace pyfast
