#include "cpu/dropout.h"

#include "binding/binding.h"

namespace pyfast {
namespace {

Tensor dropout_cpu(const Tensor& x, const Tensor& seed, double p) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed must be one int64");
  STD_TORCH_CHECK(p >= 0 && p < 1, "expected 0 <= p < 1, got ", p);
  Tensor in = torch::stable::contiguous(x), y = new_contiguous(x);
  dropout(dtype_of(x), in.const_data_ptr(), y.mutable_data_ptr(), in.numel(), p,
          uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr())));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout_cpu)); }

}  // namespace pyfast
