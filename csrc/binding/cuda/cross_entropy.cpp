#include "binding/cross_entropy.h"

#include "binding/cuda/device.h"
#include "cuda/cross_entropy.h"

namespace pyfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cuda(const CrossEntropyCall& c) {
  Tensor loss = make_empty(c.input, {c.rows}, ScalarType::Double),
         lse = make_empty(c.input, {c.rows}, ScalarType::Double);
  Tensor dinput = make_empty(c.input, {0});
  if (c.upstream) dinput = make_empty(c.input, {c.rows, c.classes});
  cuda::CrossEntropy a{};
  a.input = c.input.const_data_ptr();
  a.rows = c.rows, a.classes = c.classes, a.stride = c.input.stride(0);
  a.target = static_cast<const int64_t*>(c.target.const_data_ptr());
  a.weight = optional_values<float>(c.weight, ScalarType::Float, "weight", {c.classes}, "classes");
  a.upstream = optional_values<double>(c.upstream, ScalarType::Double, "upstream", {c.rows, 2}, "rows, 2");
  a.ignore_index = c.ignore_index, a.label_smoothing = c.label_smoothing, a.softcap = float(c.softcap.value_or(0.0));
  a.loss = static_cast<double*>(loss.mutable_data_ptr()), a.lse = static_cast<double*>(lse.mutable_data_ptr());
  a.dinput = dinput.mutable_data_ptr();
  const OnDevice device(c.input);
  check_launch(pyfast_cuda_cross_entropy(dtype_of(c.input), &a, device.stream()), "cross_entropy");
  return {loss, lse, dinput};
}

}  // namespace

PYFAST_CUDA_IMPL(m) { m.impl("cross_entropy", TORCH_BOX(&cross_entropy_op<cross_entropy_cuda>)); }

}  // namespace pyfast
