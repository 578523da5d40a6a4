#include "cpu/philox.h"

#include "binding/binding.h"

namespace pyfast {
namespace {

Tensor dropout_factors_cpu(const Tensor& seed, int64_t begin, int64_t count, double p) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed must be one int64");
  STD_TORCH_CHECK(p >= 0 && p < 1 && begin >= 0 && count >= 0, "expected 0 <= p < 1, begin >= 0 and count >= 0");
  Tensor factors = make_empty(seed, {count}, ScalarType::Float);
  dropout_factors(p, uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr())), uint64_t(begin), count,
                  static_cast<float*>(factors.mutable_data_ptr()));
  return factors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CPU, m) { m.impl("dropout_factors", TORCH_BOX(&dropout_factors_cpu)); }

}  // namespace pyfast
