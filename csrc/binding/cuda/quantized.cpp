#include "cuda/quantized.h"

#include "binding/cuda/device.h"
#include "binding/quantized.h"

namespace pyfast {
namespace {

Tensor dequantize(const Tensor& codes, const Tensor& scale, std::vector<double> levels, int64_t n, int64_t k,
                  int64_t block_rows, int64_t block_columns, ScalarType dtype) {
  check_codes(codes, scale, levels.size(), n, k, block_rows, block_columns);
  Tensor out = make_empty(codes, {n, k}, dtype);
  cuda::Dequantize a{};
  a.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  a.scale = scale.const_data_ptr<float>();
  std::copy(levels.begin(), levels.end(), a.levels);
  a.level_count = int(levels.size()), a.n = n, a.k = k, a.block_rows = block_rows, a.block_columns = block_columns;
  a.dtype = dtype_of(out), a.out = out.mutable_data_ptr();
  const OnDevice device(codes);
  check_launch(pyfast_cuda_dequantize(&a, device.stream()), "dequantize");
  return out;
}

}  // namespace

PYFAST_CUDA_IMPL(m) { m.impl("dequantize", TORCH_BOX(&dequantize)); }

}  // namespace pyfast
