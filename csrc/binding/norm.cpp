#include "cpu/norm.h"

#include "binding/binding.h"

namespace pyfast {
namespace {

using Optional = std::optional<Tensor>;

// The rows of x, and how many lines of N values weight and bias hold
NormShape shape_for(const Tensor& x, const Optional& weight, const Optional& bias, bool center) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) > 0, "x must be (..., N) with N at least 1");
  int64_t cols = x.size(x.dim() - 1);
  auto lines = [&](const Optional& p, const char* name) {
    if (!p) return int64_t(1);
    bool fits = p->dim() >= 1 && p->dim() <= x.dim();
    for (int64_t i = 1; fits && i <= p->dim(); ++i) fits = p->size(p->dim() - i) == x.size(x.dim() - i);
    STD_TORCH_CHECK(fits, name, " has shape ", shape_of(*p), ", expected trailing dimensions of x ", shape_of(x));
    return p->numel() / cols;
  };
  return {x.numel() / cols, cols, lines(weight, "weight"), lines(bias, "bias"), center};
}

// weight + offset in fp32; ones where there is no weight
Tensor weight_lines(const Tensor& x, const Optional& weight, float offset, int64_t cols) {
  if (weight) return to_fp32(*weight, offset);
  Tensor ones = new_fp32(x, {cols});
  return torch::stable::fill_(ones, 1.0);
}

Tensor empty_or_like(const Tensor& x, bool like) { return like ? new_contiguous(x) : make_empty(x, {0}); }

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_cpu(const Tensor& x, Optional weight, Optional bias, Optional residual,
                                                    double eps, double weight_offset, bool center) {
  NormShape shape = shape_for(x, weight, bias, center);
  if (residual) check_like(x, *residual, "residual");
  RowsOf in = rows_of(x), other = rows_of(residual ? *residual : x);
  Tensor w = weight_lines(x, weight, float(weight_offset), shape.cols);
  Tensor b = bias ? to_fp32(*bias) : w;
  Tensor y = new_contiguous(x), sum = empty_or_like(x, residual.has_value());
  std::vector<int64_t> leading(x.sizes().begin(), x.sizes().end() - 1), none{0};
  Tensor mean = make_empty(x, center ? leading : none, ScalarType::Float);
  Tensor rstd = make_empty(x, leading, ScalarType::Float);
  norm(dtype_of(x), shape, in, residual ? Rows(other) : Rows{nullptr, 0}, (const float*)w.const_data_ptr(),
       bias ? (const float*)b.const_data_ptr() : nullptr, eps, y.mutable_data_ptr(), sum.mutable_data_ptr(),
       (float*)mean.mutable_data_ptr(), (float*)rstd.mutable_data_ptr());
  return {y, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward_cpu(const Tensor& dy, Optional dsum, const Tensor& x,
                                                     const Tensor& mean, const Tensor& rstd, Optional weight,
                                                     Optional bias, double weight_offset, bool center,
                                                     bool weight_gradient, bool bias_gradient) {
  NormShape shape = shape_for(x, weight, bias, center);
  check_like(x, dy, "dy");
  if (dsum) check_like(x, *dsum, "dsum");
  STD_TORCH_CHECK(rstd.numel() == shape.rows && mean.numel() == (center ? shape.rows : 0) &&
                      rstd.scalar_type() == ScalarType::Float && mean.scalar_type() == ScalarType::Float,
                  "mean and rstd must be the forward's, fp32, one per row");
  CHECK_CONTIGUOUS(mean);
  CHECK_CONTIGUOUS(rstd);
  STD_TORCH_CHECK((weight || !weight_gradient) && (bias || !bias_gradient), "no gradient without its parameter");
  RowsOf in = rows_of(x), d = rows_of(dy), extra = rows_of(dsum ? *dsum : dy);
  Tensor w = weight_lines(x, weight, float(weight_offset), shape.cols), dx = new_contiguous(x);
  Tensor dweight = empty_or_like(weight ? *weight : x, weight_gradient);
  Tensor dbias = empty_or_like(bias ? *bias : x, bias_gradient);
  int64_t blocks = row_blocks(shape.rows);
  Tensor partial_w = new_fp32(x, {weight_gradient ? blocks : 0, shape.weight_lines * shape.cols});
  Tensor partial_b = new_fp32(x, {bias_gradient ? blocks : 0, shape.bias_lines * shape.cols});
  float* pw = weight_gradient ? (float*)partial_w.mutable_data_ptr() : nullptr;
  float* pb = bias_gradient ? (float*)partial_b.mutable_data_ptr() : nullptr;
  norm_backward(dtype_of(x), shape, d, dsum ? Rows(extra) : Rows{nullptr, 0}, in, (const float*)mean.const_data_ptr(),
                (const float*)rstd.const_data_ptr(), (const float*)w.const_data_ptr(), dx.mutable_data_ptr(), pw, pb);
  if (weight_gradient) sum_blocks(pw, blocks, dweight.numel(), dtype_of(dweight), dweight.mutable_data_ptr());
  if (bias_gradient) sum_blocks(pb, blocks, dbias.numel(), dtype_of(dbias), dbias.mutable_data_ptr());
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CPU, m) {
  m.impl("norm", TORCH_BOX(&norm_cpu));
  m.impl("norm_backward", TORCH_BOX(&norm_backward_cpu));
}

}  // namespace pyfast
