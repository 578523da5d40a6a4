#include "cuda/cross_entropy.h"

#include "binding/cuda/device.h"

namespace pyfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& input, const Tensor& target,
                                                 const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& upstream, int64_t ignore_index,
                                                 double label_smoothing, std::optional<double> softcap) {
  STD_TORCH_CHECK(input.dim() == 2 && (input.stride(1) == 1 || input.size(1) == 1), "input has shape ", shape_of(input),
                  ", expected (rows, classes) with contiguous rows");
  const int64_t rows = input.size(0), classes = input.size(1);
  STD_TORCH_CHECK(classes > 0, "there are no classes");
  CHECK_SHAPE(target, rows);
  CHECK_CONTIGUOUS(target);
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "target must be int64");
  Tensor loss = torch::stable::new_empty(input, {rows}, ScalarType::Double), lse = torch::stable::empty_like(loss);
  Tensor dinput = upstream ? torch::stable::new_empty(input, {rows, classes}) : torch::stable::new_empty(input, {0});
  cuda::CrossEntropy a{};
  a.input = input.const_data_ptr();
  a.rows = rows, a.classes = classes, a.stride = input.stride(0);
  a.target = static_cast<const int64_t*>(target.const_data_ptr());
  a.weight = optional_values<float>(weight, ScalarType::Float, "weight", {classes}, "classes");
  a.upstream = optional_values<double>(upstream, ScalarType::Double, "upstream", {rows, 2}, "rows, 2");
  a.ignore_index = ignore_index, a.label_smoothing = label_smoothing, a.softcap = float(softcap.value_or(0.0));
  a.loss = static_cast<double*>(loss.mutable_data_ptr()), a.lse = static_cast<double*>(lse.mutable_data_ptr());
  a.dinput = dinput.mutable_data_ptr();
  const OnDevice device(input);
  check_launch(pyfast_cuda_cross_entropy(dtype_of(input), &a, device.stream()), "cross_entropy");
  return {loss, lse, dinput};
}

}  // namespace

PYFAST_CUDA_IMPL(m) { m.impl("cross_entropy", TORCH_BOX(&cross_entropy)); }

}  // namespace pyfast
