// What the cross-entropy bindings of every backend share: the schema's arguments.
#pragma once
#include "binding/binding.h"

namespace pyfast {

struct CrossEntropyCall {
  const Tensor &input, &target;
  const std::optional<Tensor>&weight, &upstream;
  int64_t ignore_index;
  double label_smoothing;
  std::optional<double> softcap;
  int64_t rows, classes;
};

// The schema's function, which hands a backend's own the checked arguments
template <auto run>
std::tuple<Tensor, Tensor, Tensor> cross_entropy_op(const Tensor& input, const Tensor& target,
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
  return run({input, target, weight, upstream, ignore_index, label_smoothing, softcap, rows, classes});
}

}  // namespace pyfast
