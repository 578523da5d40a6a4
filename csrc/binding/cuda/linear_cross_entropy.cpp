#include "cuda/linear_cross_entropy.h"

#include "binding/cuda/device.h"

namespace pyfast {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

cuda::Matrix matrix(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

Gradients linear_cross_entropy(const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias,
                               const OptionalTensor& lora_A, const OptionalTensor& lora_B, const Tensor& target,
                               const OptionalTensor& weight, const OptionalTensor& upstream, double scaling,
                               int64_t ignore_index, double label_smoothing, std::optional<double> softcap,
                               double logit_scale, int64_t logits_bytes, std::vector<bool> needs) {
  STD_TORCH_CHECK(input.dim() == 2 && linear_weight.dim() == 2, "input and linear_weight must have two dimensions");
  cuda::LinearCrossEntropy a{};
  a.dtype = dtype_of(input);
  const int64_t rows = a.rows = input.size(0), features = a.features = input.size(1);
  const int64_t classes = a.classes = linear_weight.size(0);
  STD_TORCH_CHECK(classes > 0, "there are no classes");
  CHECK_CONTIGUOUS(input);
  CHECK_SHAPE(linear_weight, classes, features);
  CHECK_SAME_DTYPE(linear_weight, input);
  a.input = input.const_data_ptr(), a.weight = matrix(linear_weight);
  if (linear_bias) {
    CHECK_SHAPE((*linear_bias), classes);
    CHECK_SAME_DTYPE((*linear_bias), input);
    a.bias = linear_bias->const_data_ptr(), a.bias_stride = linear_bias->stride(0);
  }
  STD_TORCH_CHECK(lora_A.has_value() == lora_B.has_value(), "lora_A and lora_B go together");
  if (lora_A) {
    const int64_t rank = a.rank = lora_A->size(0);
    CHECK_SHAPE((*lora_A), rank, features);
    CHECK_SHAPE((*lora_B), classes, rank);
    CHECK_SAME_DTYPE((*lora_A), input);
    CHECK_SAME_DTYPE((*lora_B), input);
    a.lora_A = matrix(*lora_A), a.lora_B = matrix(*lora_B);
  }
  CHECK_SHAPE(target, rows);
  CHECK_CONTIGUOUS(target);
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "target must be int64");
  a.target = static_cast<const int64_t*>(target.const_data_ptr());
  a.class_weight = optional_values<float>(weight, ScalarType::Float, "weight", {classes}, "classes");
  a.upstream = optional_values<double>(upstream, ScalarType::Double, "upstream", {rows, 2}, "rows, 2");
  a.ignore_index = ignore_index, a.label_smoothing = label_smoothing;
  a.scaling = float(scaling), a.softcap = float(softcap.value_or(0.0)), a.logit_scale = float(logit_scale);
  a.logits_bytes = logits_bytes;
  STD_TORCH_CHECK(needs.size() == 5,
                  "needs has one entry for each of input, linear_weight, linear_bias, lora_A, lora_B");

  Tensor loss = make_empty(input, {rows}, ScalarType::Double), lse = make_empty(input, {rows}, ScalarType::Double);
  a.loss = static_cast<double*>(loss.mutable_data_ptr()), a.lse = static_cast<double*>(lse.mutable_data_ptr());
  // what no row reaches stays zero: rows of input that are ignored, and everything where there are no rows
  const auto gradient = [&](int i, const OptionalTensor& like, auto*& to) {
    const ScalarType type = i ? ScalarType::Float : input.scalar_type();
    if (!upstream || !like || !needs[i]) return make_empty(input, {0}, type);
    Tensor g = make_empty(input, like->sizes(), type);
    if (i == 0 || rows == 0) torch::stable::zero_(g);
    if (g.numel()) to = static_cast<std::remove_reference_t<decltype(to)>>(g.mutable_data_ptr());
    return g;
  };
  Tensor dinput = gradient(0, input, a.dinput), dweight = gradient(1, linear_weight, a.dweight);
  Tensor dbias = gradient(2, linear_bias, a.dbias), dA = gradient(3, lora_A, a.dA), dB = gradient(4, lora_B, a.dB);

  const OnDevice device(input);
  int64_t bytes[cuda::kMemories];
  check_launch(pyfast_cuda_linear_cross_entropy_memory(&a, bytes), "linear_cross_entropy");
  std::vector<Tensor> memory;
  for (int i = 0; i < cuda::kMemories; ++i) {
    memory.push_back(make_empty(input, {bytes[i]}, ScalarType::Byte));
    a.memory[i] = memory.back().mutable_data_ptr();
  }
  check_launch(pyfast_cuda_linear_cross_entropy(&a, device.stream()), "linear_cross_entropy");
  return {loss, lse, dinput, dweight, dbias, dA, dB};
}

}  // namespace

PYFAST_CUDA_IMPL(m) { m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy)); }

}  // namespace pyfast
